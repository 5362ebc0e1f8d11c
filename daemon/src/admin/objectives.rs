//! What operators ask about the archive and the recovery objectives.

use futures::StreamExt;
use replication::archive::chain::Chain;
use replication::archive::survey::{Kept, Survey, survey};
use tonic::Status;

use super::AdminService;
use crate::directory::records::DrillRecord;
use crate::objectives::Standing;
use crate::proto::admin::{Archive, ArchiveChain, ArchiveCheckpoint, Objective, ObjectiveList};
use crate::tenant::Tenant;

/// Tenants whose archive is looked at at once.
const AT_ONCE: usize = 8;

fn checkpoint(kept: &Kept) -> ArchiveCheckpoint {
    ArchiveCheckpoint {
        link: kept.manifest.link,
        revision: kept.manifest.revision,
        at_ms: kept.at_ms,
        bytes: kept.bytes(),
        time_ms: kept.manifest.time_ms,
    }
}

fn chain(found: &Survey) -> ArchiveChain {
    let (first, last) = (found.links.first(), found.links.last());
    ArchiveChain {
        incarnation: found.incarnation,
        first_link: first.map_or(0, |(number, _, _)| *number),
        last_link: last.map_or(0, |(number, _, _)| *number),
        links: found.links.len() as u64,
        bytes: found.links.iter().map(|(_, bytes, _)| bytes).sum(),
        from_ms: first.map_or(0, |(_, _, at)| *at),
        to_ms: last.map_or(0, |(_, _, at)| *at),
        closed: found.closed,
        checkpoints: found.checkpoints.iter().map(checkpoint).collect(),
        behind_bytes: found.behind(),
        whole: found.is_whole(),
    }
}

impl AdminService {
    pub(super) async fn archive(&self, name: &str) -> Result<Archive, Status> {
        let record = self.found(name)?.record();
        let key = self.0.archive_key();
        let key = key.ok_or_else(|| Status::unavailable("the archive key is not known yet"))?;
        let newest = Chain::new(self.0.parts.bucket.clone(), key, record.group());
        let mut chains = Vec::new();
        for incarnation in 1..=record.incarnation {
            let found = survey(&newest.of(incarnation)).await;
            let found = found.map_err(|e| Status::unavailable(e.to_string()))?;
            chains.push(chain(&found));
        }
        Ok(Archive { chains })
    }

    /// The worst first.
    pub(super) async fn objectives(&self) -> Result<ObjectiveList, Status> {
        let drills = self.directory()?.drills();
        let drills = drills.map_err(|e| Status::unavailable(e.to_string()))?;
        let tenants = self.0.tenants.all();
        let asked = tenants.iter().map(|tenant| {
            let id = tenant.record().id;
            let drill = drills.iter().find(|d| d.record.tenant == id);
            self.objective(tenant, drill.map(|d| &d.record))
        });
        let found = futures::stream::iter(asked.collect::<Vec<_>>()).buffered(AT_ONCE);
        let mut objectives: Vec<Objective> = found.collect().await;
        let part = |is: u64, of: u64| is as f64 / of.max(1_000) as f64;
        let worst = |o: &Objective| {
            let unknown = if o.problem.is_empty() { 0.0 } else { f64::MAX };
            let rpo = part(o.actual_rpo_ms, o.rpo_ms);
            rpo.max(part(o.estimated_rto_ms, o.rto_ms)).max(unknown)
        };
        objectives.sort_by(|a, b| worst(b).total_cmp(&worst(a)).then(a.tenant.cmp(&b.tenant)));
        Ok(ObjectiveList { objectives })
    }

    async fn objective(&self, tenant: &Tenant, drill: Option<&DrillRecord>) -> Objective {
        let record = tenant.record();
        let mut objective = Objective {
            tenant: record.name.clone(),
            tier: record.tier.name().into(),
            rpo_ms: record.rpo_ms,
            rto_ms: record.rto_ms,
            drill_ms: drill.map_or(0, |d| d.at_ms),
            state: "unknown".into(),
            ..Objective::default()
        };
        let group = match tenant.group() {
            Ok(group) => group,
            Err(why) => {
                objective.problem = why;
                return objective;
            }
        };
        objective.actual_rpo_ms = group.unarchived_for().as_millis() as u64;
        match self.0.estimate(&record).await {
            Ok(estimate) => {
                objective.checkpoint_bytes = estimate.checkpoint_bytes;
                objective.log_bytes = estimate.log_bytes;
                objective.estimated_rto_ms = estimate.rto_ms;
            }
            Err(why) => objective.problem = format!("what a restore takes is not known: {why}"),
        }
        let rpo = Standing::of(objective.actual_rpo_ms, record.rpo_ms);
        let rto = Standing::of(objective.estimated_rto_ms, record.rto_ms);
        if objective.problem.is_empty() || rpo > Standing::Met {
            objective.state = rpo.max(rto).name().into();
        }
        if let Some(failed) = drill.filter(|d| !d.problem.is_empty()) {
            objective.problem = format!("its newest drill failed: {}", failed.problem);
        }
        objective
    }
}
