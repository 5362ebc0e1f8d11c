//! openraft's state machine traits on the machine, and its snapshots on checkpoints.

use std::io;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use futures::{Stream, TryStreamExt};
use kms::TenantKeys;
use openraft::storage::{ApplyResponder, EntryResponder, RaftStateMachine};
use openraft::{OptionalSend, RaftSnapshotBuilder};

use super::replica::sync_dir;
use super::sealing::{Replica, lacks};
use super::types::{
    Answer, LogId, SnapshotMeta, StoredMembership, TypeConfig, decode_membership,
    encode_membership, log_id,
};
use crate::engine::Engine;
use crate::failpoint::failpoint;
use crate::machine::{Machine, State};

/// How often a snapshot is tried of a tenant that was sealed before its first.
const SEALED_AGAIN: Duration = Duration::from_secs(1);

/// A checkpoint's directory and the state that it stands at. Its files stay readable while they are
/// open.
#[derive(Clone, Debug)]
pub struct SnapshotDir {
    pub path: PathBuf,
    pub state: State,
}

type Snapshot = openraft::alias::SnapshotOf<TypeConfig, SnapshotDir>;

pub struct StateMachine(pub Arc<Replica>);

impl RaftStateMachine<TypeConfig> for StateMachine {
    type SnapshotData = SnapshotDir;
    type SnapshotBuilder = Builder;

    async fn applied_state(&mut self) -> Result<(Option<LogId>, StoredMembership), io::Error> {
        let applied = self.0.applied().await?;
        Ok((applied.position, applied.membership))
    }

    async fn apply<Strm>(&mut self, mut entries: Strm) -> Result<(), io::Error>
    where
        Strm: Stream<Item = Result<EntryResponder<TypeConfig>, io::Error>> + Unpin + OptionalSend,
    {
        let mut batch = Vec::new();
        let mut responders: Vec<Option<ApplyResponder<TypeConfig>>> = Vec::new();
        while let Some((entry, responder)) = entries.try_next().await? {
            batch.push(entry);
            responders.push(responder);
        }
        if batch.is_empty() {
            return Ok(());
        }
        let replies = self.0.apply(batch).await?;
        for (responder, replies) in responders.into_iter().zip(replies) {
            if let Some(responder) = responder {
                responder.send(Answer { replies });
            }
        }
        Ok(())
    }

    /// None while there is nothing to make a snapshot of: sealed before the first one.
    async fn try_create_snapshot_builder(&mut self, _force: bool) -> Option<Builder> {
        let none = self.0.sealed().is_some() && !matches!(self.0.dir.snapshot(), Ok(Some(_)));
        (!none).then(|| Builder(self.0.clone()))
    }

    async fn get_snapshot_builder(&mut self) -> Builder {
        Builder(self.0.clone())
    }

    async fn install_snapshot(
        &mut self,
        meta: &SnapshotMeta,
        snapshot: SnapshotDir,
    ) -> Result<(), io::Error> {
        let (replica, meta) = (self.0.clone(), meta.clone());
        tokio::task::spawn_blocking(move || install(&replica, &meta, snapshot))
            .await
            .map_err(io::Error::other)?
    }

    async fn get_current_snapshot(&mut self) -> Result<Option<Snapshot>, io::Error> {
        let _one = self.0.snapshots.lock();
        current(&self.0)
    }
}

fn current(replica: &Replica) -> io::Result<Option<Snapshot>> {
    let found = replica.dir.snapshot()?;
    Ok(found.map(|found| Snapshot {
        meta: found.meta,
        snapshot: SnapshotDir {
            path: found.dir,
            state: found.state,
        },
    }))
}

/// Puts a received checkpoint in use.
fn install(replica: &Replica, meta: &SnapshotMeta, snapshot: SnapshotDir) -> io::Result<()> {
    let mut passed = replica.hold();
    let _one = replica.snapshots.lock();
    // Files under a generation that has not come here yet are kept until it has.
    if let Some(machine) = replica.machine()
        && let Some(why) = lacks(&snapshot.path, machine.keys())
    {
        drop(machine);
        replica.park(&why, &mut passed)?;
    }
    let before = match replica.machine() {
        Some(machine) => install_open(replica, &machine, meta, &snapshot.path)?,
        None => {
            // As files only: the tenant's key is away.
            let dir = &replica.dir;
            let before = dir.put_checkpoint(&snapshot.path, meta, &snapshot.state)?;
            passed.position = meta.last_log_id;
            passed.membership = meta.last_membership.clone();
            replica
                .store
                .pass(meta.last_log_id.as_ref().map(super::types::position));
            before
        }
    };
    let _ = std::fs::remove_dir_all(before);
    let _ = std::fs::remove_dir_all(&snapshot.path);
    Ok(())
}

/// Opens the received checkpoint as the next engine and puts it in use. Nothing of the old engine
/// is touched before the new one is open and has the snapshot's position and membership.
fn install_open(
    replica: &Replica,
    machine: &Machine,
    meta: &SnapshotMeta,
    files: &std::path::Path,
) -> io::Result<PathBuf> {
    let (number, path) = replica.dir.next_engine(files)?;
    let engine = Engine::open(&path, machine.keys().clone(), &replica.budget)?;
    let mut state = State::read(&engine)?;
    let mut batch = rocksdb::WriteBatch::default();
    state.applied = meta.last_log_id.as_ref().map(super::types::position);
    state.write(&engine, &mut batch);
    State::write_membership(
        &engine,
        &mut batch,
        &encode_membership(&meta.last_membership),
    );
    engine.write(batch)?;
    // Durable before it is named: a checkpoint flushes, and is then the snapshot as well.
    let scratch = replica.dir.scratch("installed");
    let _ = std::fs::remove_dir_all(&scratch);
    engine.checkpoint(&scratch)?;
    sync_dir(&scratch)?;
    let before = replica.dir.use_engine(number)?;
    replica.dir.set_snapshot(&scratch, meta, &state)?;
    replica.store.replace(engine)?;
    Ok(before)
}

/// Makes a checkpoint of the present state.
pub struct Builder(Arc<Replica>);

impl RaftSnapshotBuilder<TypeConfig> for Builder {
    type SnapshotData = SnapshotDir;

    async fn build_snapshot(&mut self) -> Result<Snapshot, io::Error> {
        loop {
            let replica = self.0.clone();
            let built = tokio::task::spawn_blocking(move || build(&replica))
                .await
                .map_err(io::Error::other)??;
            match built {
                Some(snapshot) => return Ok(snapshot),
                // Sealed before it ever made one.
                None => tokio::time::sleep(SEALED_AGAIN).await,
            }
        }
    }
}

/// A sealed replica has the checkpoint that it made last.
fn build(replica: &Replica) -> io::Result<Option<Snapshot>> {
    let _one = replica.snapshots.lock();
    let (Some(machine), Ok(engine)) = (replica.machine(), replica.store.engine()) else {
        return current(replica);
    };
    match checkpoint(replica, &machine, engine) {
        Ok(made) => Ok(Some(made)),
        // Sealing ends what the engine does; that must not end the group.
        Err(_) if replica.sealed().is_some() => current(replica),
        Err(e) => Err(e),
    }
}

fn checkpoint(replica: &Replica, machine: &Machine, engine: Arc<Engine>) -> io::Result<Snapshot> {
    let scratch = replica.dir.scratch("checkpoint");
    let _ = std::fs::remove_dir_all(&scratch);
    engine.checkpoint(&scratch)?;
    drop(engine);
    failpoint("checkpoint-made");
    sync_dir(&scratch)?;
    // Apply goes on meanwhile: the checkpoint itself says where it stands.
    let (meta, state) = read_meta(&scratch, replica, machine.keys().clone())?;
    let path = replica.dir.set_snapshot(&scratch, &meta, &state)?;
    failpoint("checkpoint-named");
    let snapshot = SnapshotDir { path, state };
    Ok(Snapshot { meta, snapshot })
}

/// The position and membership that a checkpoint stands at, read from a linked copy of it.
fn read_meta(
    dir: &std::path::Path,
    replica: &Replica,
    keys: Arc<TenantKeys>,
) -> io::Result<(SnapshotMeta, State)> {
    let copy = replica.dir.scratch("meta");
    let _ = std::fs::remove_dir_all(&copy);
    crate::engine::link_dir(dir, &copy)?;
    let engine = Engine::open(&copy, keys, &replica.budget)?;
    let state = State::read(&engine)?;
    let membership = State::read_membership(&engine)?
        .and_then(|bytes| decode_membership(&bytes))
        .unwrap_or_default();
    drop(engine);
    std::fs::remove_dir_all(&copy)?;
    let meta = SnapshotMeta {
        last_log_id: state.applied.map(log_id),
        last_membership: membership,
    };
    Ok((meta, state))
}
