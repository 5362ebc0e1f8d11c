//! What operators ask about a tenant's history, or the directory's: what is kept, what goes, what is held.

use replication::archive::chain::Chain;
use replication::archive::holds::{self, Hold, What};
use replication::archive::survey::{Kept, Survey, survey};
use tonic::Status;

use super::AdminService;
use crate::directory::Directory;
use crate::directory::records::{EventKind, TenantRecord};
use crate::proto::admin::{
    Archive, ArchiveChain, ArchiveCheckpoint, Hold as HoldMessage, HoldArchiveRequest,
    MakeCheckpointRequest, ReleaseArchiveRequest, ScrubArchiveRequest, ScrubArchiveResponse,
    SweepArchiveRequest, SweepArchiveResponse,
};
use crate::tenant::key::now_ms;

fn unavailable(e: impl std::fmt::Display) -> Status {
    Status::unavailable(e.to_string())
}

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
        whole: found.whole,
    }
}

fn message(hold: Hold) -> HoldMessage {
    HoldMessage {
        id: hold.id,
        since_ms: hold.since_ms,
        reason: hold.reason,
    }
}

impl AdminService {
    fn newest_chain(&self, record: &TenantRecord) -> Result<Chain, Status> {
        self.0.chain(record).map_err(unavailable)
    }

    pub(super) async fn archive(&self, name: &str) -> Result<Archive, Status> {
        let record = self.found(name)?.record();
        let newest = self.newest_chain(&record)?;
        let mut chains = Vec::new();
        for incarnation in 1..=record.incarnation {
            let found = survey(&newest.of(incarnation)).await;
            chains.push(chain(&found.map_err(unavailable)?));
        }
        let entries = holds::entries(newest.bucket(), newest.key(), record.id).await;
        let holds = holds::standing(&entries.map_err(unavailable)?);
        Ok(Archive {
            chains,
            keep_ms: record.keep_ms(),
            keep_checkpoints: record.keep_checkpoints() as u32,
            holds: holds.into_iter().map(message).collect(),
        })
    }

    /// The directory, if that is asked for and no tenant.
    fn asked(&self, directory: bool, name: &str) -> Result<Option<Directory>, Status> {
        match (directory, name) {
            (false, _) => Ok(None),
            (true, "") => {
                let directory = self.0.directory();
                let directory = directory.ok_or_else(|| unavailable("there is no directory yet"));
                directory.map(Some)
            }
            (true, _) => Err(Status::invalid_argument(
                "name a tenant or the directory, not both",
            )),
        }
    }

    pub(super) async fn sweep(
        &self,
        request: SweepArchiveRequest,
    ) -> Result<SweepArchiveResponse, Status> {
        let swept = match self.asked(request.directory, &request.name)? {
            Some(directory) => self.0.sweep_directory(&directory, request.dry_run).await,
            None => {
                let record = self.record(&request.name).await?.record;
                self.0.sweep(&record, request.dry_run).await
            }
        };
        let (sweep, locked) = swept.map_err(Status::failed_precondition)?;
        let unfinished = sweep.unfinished.into_iter().map(|upload| upload.object);
        Ok(SweepArchiveResponse {
            horizon_ms: sweep.horizon_ms,
            holds: sweep.holds.into_iter().map(message).collect(),
            checkpoints: sweep.retired,
            links: sweep.links,
            files: sweep.collected,
            unfinished: unfinished.collect(),
            bytes: sweep.bytes,
            unreadable: sweep.unreadable,
            locked,
        })
    }

    pub(super) async fn checkpoint(
        &self,
        request: MakeCheckpointRequest,
    ) -> Result<ArchiveCheckpoint, Status> {
        let made = match self.asked(request.directory, &request.name)? {
            Some(directory) => self.0.directory_checkpoint(&directory).await,
            None => {
                let record = self.record(&request.name).await?.record;
                self.0.checkpoint(&record).await
            }
        };
        Ok(checkpoint(&made.map_err(unavailable)?))
    }

    pub(super) async fn scrub(
        &self,
        request: ScrubArchiveRequest,
    ) -> Result<ScrubArchiveResponse, Status> {
        let scrubbed = match self.asked(request.directory, &request.name)? {
            Some(directory) => self.0.scrub_directory(&directory).await,
            None => {
                let record = self.record(&request.name).await?.record;
                self.0.scrub(&record).await
            }
        };
        let scrubbed = scrubbed.map_err(Status::failed_precondition)?;
        Ok(ScrubArchiveResponse {
            objects: scrubbed.objects,
            bytes: scrubbed.bytes,
            damages: scrubbed.damages.iter().map(ToString::to_string).collect(),
        })
    }

    pub(super) async fn hold(&self, request: HoldArchiveRequest) -> Result<HoldMessage, Status> {
        let record = self.record(&request.name).await?.record;
        let reason = request.reason.trim();
        if reason.is_empty() || reason.len() > 1000 {
            return Err(Status::invalid_argument(
                "say why it is held, in at most 1,000 characters",
            ));
        }
        let hold = Hold {
            id: hex::encode(kms::secret::random_bytes::<4>()),
            since_ms: request.since_ms,
            reason: reason.into(),
        };
        self.add(&record, What::Hold(hold.clone())).await?;
        let said = format!("hold {}: {}", hold.id, hold.reason);
        self.0.event(&record, EventKind::HoldPlaced, said);
        Ok(message(hold))
    }

    pub(super) async fn release(&self, request: ReleaseArchiveRequest) -> Result<(), Status> {
        let record = self.record(&request.name).await?.record;
        let chain = self.newest_chain(&record)?;
        let entries = holds::entries(chain.bucket(), chain.key(), record.id).await;
        let standing = holds::standing(&entries.map_err(unavailable)?);
        if !standing.iter().any(|hold| hold.id == request.id) {
            return Err(Status::not_found(format!(
                "no hold {} stands on tenant {}; 'holdfast archive ls {}' lists them",
                request.id, record.name, record.name
            )));
        }
        self.add(&record, What::Release(request.id.clone())).await?;
        let said = format!("hold {} is released", request.id);
        self.0.event(&record, EventKind::HoldReleased, said);
        Ok(())
    }

    async fn add(&self, record: &TenantRecord, what: What) -> Result<(), Status> {
        let chain = self.newest_chain(record)?;
        let added = holds::add(chain.bucket(), chain.key(), record.id, now_ms(), what).await;
        added.map_err(unavailable)
    }
}
