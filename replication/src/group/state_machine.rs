//! openraft's state machine traits on the machine, and its snapshots on checkpoints.

use std::io;
use std::path::PathBuf;
use std::sync::Arc;

use futures::{Stream, TryStreamExt};
use kms::TenantKeys;
use openraft::storage::{ApplyResponder, EntryResponder, RaftStateMachine};
use openraft::{OptionalSend, RaftSnapshotBuilder};

use super::replica::{ReplicaDir, sync_dir};
use super::types::{
    Answer, LogId, SnapshotMeta, StoredMembership, TypeConfig, decode_membership,
    encode_membership, log_id, machine_entry,
};
use crate::engine::{Budget, Engine};
use crate::machine::{Machine, State};

/// A checkpoint's directory. Its files stay readable while they are open.
#[derive(Clone, Debug)]
pub struct SnapshotDir(pub PathBuf);

type Snapshot = openraft::alias::SnapshotOf<TypeConfig, SnapshotDir>;

/// What snapshots are made from and installed into.
pub struct Replica {
    pub dir: ReplicaDir,
    pub keys: Arc<TenantKeys>,
    pub budget: Arc<Budget>,
    /// One snapshot is made or installed at a time.
    pub snapshots: parking_lot::Mutex<()>,
}

pub struct StateMachine {
    pub machine: Arc<Machine>,
    pub replica: Arc<Replica>,
}

fn applied(machine: &Machine) -> io::Result<(Option<LogId>, StoredMembership)> {
    let engine = machine.store().engine();
    let state = State::read(&engine)?;
    let membership = match State::read_membership(&engine)? {
        Some(bytes) => decode_membership(&bytes)
            .ok_or_else(|| io::Error::other("the stored membership does not parse"))?,
        None => StoredMembership::default(),
    };
    Ok((state.applied.map(log_id), membership))
}

impl RaftStateMachine<TypeConfig> for StateMachine {
    type SnapshotData = SnapshotDir;
    type SnapshotBuilder = Builder;

    async fn applied_state(&mut self) -> Result<(Option<LogId>, StoredMembership), io::Error> {
        applied(&self.machine)
    }

    async fn apply<Strm>(&mut self, mut entries: Strm) -> Result<(), io::Error>
    where
        Strm: Stream<Item = Result<EntryResponder<TypeConfig>, io::Error>> + Unpin + OptionalSend,
    {
        let mut batch = Vec::new();
        let mut responders: Vec<Option<ApplyResponder<TypeConfig>>> = Vec::new();
        while let Some((entry, responder)) = entries.try_next().await? {
            batch.push(machine_entry(entry));
            responders.push(responder);
        }
        if batch.is_empty() {
            return Ok(());
        }
        let group = self.machine.group();
        let replies = self.machine.apply(batch).map_err(|e| {
            tracing::error!(%group, error = %e, "this replica cannot apply an entry: it stops here");
            io::Error::other(e.to_string())
        })?;
        for (responder, replies) in responders.into_iter().zip(replies) {
            if let Some(responder) = responder {
                responder.send(Answer { replies });
            }
        }
        Ok(())
    }

    async fn get_snapshot_builder(&mut self) -> Builder {
        Builder {
            machine: self.machine.clone(),
            replica: self.replica.clone(),
        }
    }

    async fn install_snapshot(
        &mut self,
        meta: &SnapshotMeta,
        snapshot: SnapshotDir,
    ) -> Result<(), io::Error> {
        let (machine, replica, meta) = (self.machine.clone(), self.replica.clone(), meta.clone());
        tokio::task::spawn_blocking(move || install(&machine, &replica, &meta, snapshot))
            .await
            .map_err(io::Error::other)?
    }

    async fn get_current_snapshot(&mut self) -> Result<Option<Snapshot>, io::Error> {
        let _one = self.replica.snapshots.lock();
        let found = self.replica.dir.snapshot()?;
        Ok(found.map(|found| Snapshot {
            meta: found.meta,
            snapshot: SnapshotDir(found.dir),
        }))
    }
}

/// Opens the received checkpoint as the next engine and puts it in use. Nothing of the old engine
/// is touched before the new one is open and has the snapshot's position and membership.
fn install(
    machine: &Machine,
    replica: &Replica,
    meta: &SnapshotMeta,
    snapshot: SnapshotDir,
) -> io::Result<()> {
    let _one = replica.snapshots.lock();
    let (number, path) = replica.dir.next_engine(&snapshot.0)?;
    let engine = Engine::open(&path, replica.keys.clone(), &replica.budget)?;
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
    replica.dir.set_snapshot(&scratch, meta, &state)?;
    let before = replica.dir.use_engine(number)?;
    machine.store().replace(engine)?;
    let _ = std::fs::remove_dir_all(before);
    let _ = std::fs::remove_dir_all(&snapshot.0);
    Ok(())
}

/// Makes a checkpoint of the present state.
pub struct Builder {
    machine: Arc<Machine>,
    replica: Arc<Replica>,
}

impl RaftSnapshotBuilder<TypeConfig> for Builder {
    type SnapshotData = SnapshotDir;

    async fn build_snapshot(&mut self) -> Result<Snapshot, io::Error> {
        let (machine, replica) = (self.machine.clone(), self.replica.clone());
        tokio::task::spawn_blocking(move || build(&machine, &replica))
            .await
            .map_err(io::Error::other)?
    }
}

fn build(machine: &Machine, replica: &Replica) -> io::Result<Snapshot> {
    let _one = replica.snapshots.lock();
    let scratch = replica.dir.scratch("checkpoint");
    let _ = std::fs::remove_dir_all(&scratch);
    machine.store().engine().checkpoint(&scratch)?;
    sync_dir(&scratch)?;
    // Apply goes on meanwhile: the checkpoint itself says where it stands.
    let (meta, state) = read_meta(&scratch, replica)?;
    let dir = replica.dir.set_snapshot(&scratch, &meta, &state)?;
    Ok(Snapshot {
        meta,
        snapshot: SnapshotDir(dir),
    })
}

/// The position and membership that a checkpoint stands at, read from a linked copy of it.
fn read_meta(dir: &std::path::Path, replica: &Replica) -> io::Result<(SnapshotMeta, State)> {
    let copy = replica.dir.scratch("meta");
    let _ = std::fs::remove_dir_all(&copy);
    crate::engine::link_dir(dir, &copy)?;
    let engine = Engine::open(&copy, replica.keys.clone(), &replica.budget)?;
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
