//! What operators ask about the recovery objectives.

use futures::StreamExt;
use tonic::Status;

use super::AdminService;
use crate::directory::records::{DrillRecord, HourRecord};
use crate::objectives::Standing;
use crate::proto::admin::{Objective, ObjectiveHistoryResponse, ObjectiveHour, ObjectiveList};
use crate::tenant::Tenant;

/// Tenants whose archive is looked at at once.
const AT_ONCE: usize = 8;

impl AdminService {
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

    pub(super) fn objective_history(&self, name: &str) -> Result<ObjectiveHistoryResponse, Status> {
        let tenant = self.0.tenants.get(name);
        let tenant =
            tenant.ok_or_else(|| Status::not_found(format!("there is no tenant {name}")))?;
        let days = self.directory()?.objective_days(tenant.record().id);
        let days = days.map_err(|e| Status::unavailable(e.to_string()))?;
        let hours = days.into_iter().flat_map(|found| {
            let day = found.record;
            let of = move |hour: HourRecord| ObjectiveHour {
                at_ms: (day.day * 24 + u64::from(hour.hour)) * 3_600_000,
                rpo_ms: hour.rpo_ms,
                rpo_contract_ms: hour.rpo_contract_ms,
                rto_ms: hour.rto_ms,
                rto_contract_ms: hour.rto_contract_ms,
                state: Standing::of(hour.rpo_ms, hour.rpo_contract_ms)
                    .max(Standing::of(hour.rto_ms, hour.rto_contract_ms))
                    .name()
                    .into(),
            };
            day.hours.into_iter().map(of)
        });
        let mut hours: Vec<ObjectiveHour> = hours.collect();
        hours.sort_by_key(|hour| hour.at_ms);
        Ok(ObjectiveHistoryResponse { hours })
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
