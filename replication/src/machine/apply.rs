//! Applying log entries: opens each, applies its commands, writes all of them as one batch.

use std::sync::Arc;

use bytes::Bytes;
use kms::{SealError, TenantKeys};
use parking_lot::Mutex;
use prost::Message;
use rocksdb::WriteBatch;
use thiserror::Error;

use super::latest::{Known, Latest};
use super::state::State;
use super::store::{Store, read_user, user_key};
use super::txn::{branch, decide, run};
use crate::command::{EntryCodec, OpenError};
use crate::engine::{Cf, Engine, EngineError};
use crate::mvcc::check::{self, Failed};
use crate::mvcc::digest::Hasher;
use crate::mvcc::key::{self, KeyRange};
use crate::mvcc::range;
use crate::mvcc::record::{DELETE, Event, PUT, Record};
use crate::mvcc::view::{Overlay, View};
use crate::proto::command::command::Op;
use crate::proto::command::reply::Result as ReplyResult;
use crate::proto::command::{Batch, Command, Done, PutUser, Reply, User};
use crate::proto::etcdserverpb::request_op::Request;
use crate::proto::etcdserverpb::response_op::Response;
use crate::proto::etcdserverpb::{
    CompactionRequest, CompactionResponse, DeleteRangeRequest, DeleteRangeResponse, PutRequest,
    PutResponse, ResponseHeader, TxnRequest, TxnResponse,
};
use crate::{GroupId, Position};

#[derive(Debug, Error)]
pub enum MachineError {
    #[error("entry {at}: {cause}")]
    Open { at: Position, cause: OpenError },
    #[error(transparent)]
    Engine(#[from] EngineError),
}

/// What an entry of the log holds.
pub enum Payload {
    Blank,
    Sealed(Bytes),
    /// A membership, in the group's own form.
    Membership(Vec<u8>),
}

/// A committed entry.
pub struct Entry {
    pub position: Position,
    pub payload: Payload,
}

impl MachineError {
    /// The generation of the tenant's key that an entry needs and this node does not hold.
    pub fn missing_generation(&self) -> Option<u32> {
        match self {
            MachineError::Open {
                cause: OpenError::Seal(SealError::UnknownGeneration(generation)),
                ..
            } => Some(*generation),
            _ => None,
        }
    }
}

/// How far entries are applied; nothing behind it is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Until {
    End,
    /// The last entry at or before this effective time, milliseconds since 1970.
    Time(u64),
    /// The command that this revision came of, also within an entry.
    Revision(i64),
    /// The entry at this index; of that only the commands up to a revision, if it is given.
    Entry {
        index: u64,
        revision: Option<i64>,
    },
}

impl Until {
    /// Whether an entry at `index`, of effective time `time_ms`, lies behind it.
    fn ends_before(self, state: &State, index: u64, time_ms: u64) -> bool {
        match self {
            Until::End => false,
            Until::Time(last) => time_ms > last,
            Until::Revision(last) => state.revision >= last,
            Until::Entry { index: last, .. } if index > last => true,
            Until::Entry { .. } => self.ends_within(state, index),
        }
    }

    /// Whether what is left of the entry at `index` lies behind it.
    fn ends_within(self, state: &State, index: u64) -> bool {
        match self {
            Until::End | Until::Time(_) => false,
            Until::Revision(last) => state.revision >= last,
            Until::Entry {
                index: last,
                revision,
            } => index == last && revision.is_some_and(|last| state.revision >= last),
        }
    }
}

/// What was applied of some entries.
#[derive(Debug, Default)]
pub struct Applied {
    /// Of each entry that was applied.
    pub replies: Vec<Vec<Reply>>,
    /// Something lay behind the end.
    pub ended: bool,
    /// The end lies within the last entry that was applied.
    pub is_cut: bool,
}

/// Applies the entries of one group to one store. It holds the tenant's keys.
pub struct Machine {
    store: Arc<Store>,
    codec: EntryCodec,
    hasher: Hasher,
    latest: Mutex<Latest>,
    /// Dropped last: sealing waits for them to be gone, and for the codec's with them.
    keys: Arc<TenantKeys>,
}

impl Machine {
    pub fn new(store: Arc<Store>, keys: Arc<TenantKeys>, group: GroupId) -> Self {
        Machine {
            store,
            codec: EntryCodec::new(&keys, group),
            hasher: Hasher::new(&keys),
            keys,
            latest: Mutex::default(),
        }
    }

    pub fn keys(&self) -> &Arc<TenantKeys> {
        &self.keys
    }

    /// Lets go of the generations before `oldest`, and of what was derived of them.
    pub fn forget_before(&self, oldest: u32) {
        self.keys.drop_before(oldest);
        self.codec.forget_before(oldest);
    }

    pub fn codec(&self) -> &EntryCodec {
        &self.codec
    }

    /// Applies `entries` in order, atomically; answers the replies of each.
    pub fn apply(&self, entries: Vec<Entry>) -> Result<Vec<Vec<Reply>>, MachineError> {
        Ok(self.apply_until(entries, Until::End)?.replies)
    }

    /// Applies what of `entries` does not lie behind `until`, in order, atomically.
    pub fn apply_until(&self, entries: Vec<Entry>, until: Until) -> Result<Applied, MachineError> {
        let mut latest = self.latest.lock();
        let applied = self.apply_with(entries, until, &mut latest);
        if applied.is_err() {
            latest.clear();
        }
        applied
    }

    fn apply_with(
        &self,
        entries: Vec<Entry>,
        until: Until,
        latest: &mut Latest,
    ) -> Result<Applied, MachineError> {
        let engine = self.store.engine()?;
        latest.bind(&engine);
        let mut writer = Writer {
            latest,
            engine: &engine,
            hasher: &self.hasher,
            batch: WriteBatch::default(),
            overlay: Overlay::default(),
            users: Vec::new(),
            state: self.store.state(),
            base: 0,
            sub: 0,
        };
        writer.base = writer.state.revision;
        let mut applied = Applied {
            replies: Vec::with_capacity(entries.len()),
            ..Applied::default()
        };
        for entry in entries {
            self.apply_one(&mut writer, entry, until, &mut applied)?;
            if applied.ended {
                break;
            }
        }
        writer.state.write(&engine, &mut writer.batch);
        self.store.commit(writer.batch, writer.state)?;
        Ok(applied)
    }

    fn apply_one(
        &self,
        writer: &mut Writer<'_>,
        entry: Entry,
        until: Until,
        applied: &mut Applied,
    ) -> Result<(), MachineError> {
        let at = entry.position;
        // After a restart while sealed an engine can stand ahead of what has passed since.
        if writer
            .state
            .applied
            .is_some_and(|done| at.index <= done.index)
        {
            applied.replies.push(Vec::new());
            return Ok(());
        }
        let batch = match &entry.payload {
            Payload::Sealed(sealed) => self.codec.open(sealed),
            Payload::Blank | Payload::Membership(_) => Ok(Batch::default()),
        };
        let batch = batch.map_err(|cause| MachineError::Open { at, cause })?;
        let time_ms = writer.state.time_ms.max(batch.time_ms);
        applied.ended = until.ends_before(&writer.state, at.index, time_ms);
        if applied.ended {
            return Ok(());
        }
        writer.state.applied = Some(at);
        writer.state.time_ms = time_ms;
        if let Payload::Membership(membership) = &entry.payload {
            State::write_membership(writer.engine, &mut writer.batch, membership);
        }
        let mut replies = Vec::with_capacity(batch.commands.len());
        for command in batch.commands {
            applied.ended = until.ends_within(&writer.state, at.index);
            applied.is_cut = applied.ended;
            if applied.ended {
                break;
            }
            let result = match writer.command(command) {
                Ok(result) => result,
                Err(Failed::Engine(e)) => return Err(e.into()),
                Err(failed) => ReplyResult::Failure((&failed).into()),
            };
            replies.push(Reply {
                result: Some(result),
                index: at.index,
            });
        }
        applied.replies.push(replies);
        Ok(())
    }
}

/// The changes of one batch.
struct Writer<'a> {
    latest: &'a mut Latest,
    engine: &'a Engine,
    hasher: &'a Hasher,
    batch: WriteBatch,
    overlay: Overlay,
    /// Users that this batch wrote, newest last.
    users: Vec<User>,
    state: State,
    /// The revision that the engine stands at.
    base: i64,
    /// Changes of the command being applied: the next event's sub-revision.
    sub: u32,
}

pub(super) fn header(revision: i64) -> Option<ResponseHeader> {
    Some(ResponseHeader {
        revision,
        ..ResponseHeader::default()
    })
}

impl Writer<'_> {
    fn view(&self) -> View<'_> {
        View {
            engine: self.engine,
            snapshot: None,
            revision: self.base,
            overlay: Some(&self.overlay),
        }
    }

    /// Applies one command. A failed one changes nothing.
    fn command(&mut self, command: Command) -> Result<ReplyResult, Failed> {
        self.authorise(&command)?;
        self.sub = 0;
        let result = match command.op {
            Some(Op::Put(r)) => {
                self.check_put(&r)?;
                ReplyResult::Put(self.put(r)?)
            }
            Some(Op::DeleteRange(r)) => ReplyResult::DeleteRange(self.delete_range(&r)?),
            Some(Op::Txn(r)) => ReplyResult::Txn(self.txn(&r)?),
            Some(Op::Compact(r)) => ReplyResult::Compact(self.compact(&r)?),
            Some(Op::PutUser(r)) => {
                self.put_user(r)?;
                ReplyResult::Done(Done {})
            }
            None => return Err(Failed::KeyNotFound),
        };
        self.state.revision = self.revision();
        Ok(result)
    }

    /// The revision as the command sees it: one further once it has changed something.
    fn revision(&self) -> i64 {
        self.state.revision + i64::from(self.sub > 0)
    }

    fn authorise(&self, command: &Command) -> Result<(), Failed> {
        if command.user.is_empty() {
            return Ok(());
        }
        if command.auth_revision != self.state.auth_revision {
            return Err(Failed::AuthOldRevision);
        }
        let user = match self.users.iter().rev().find(|u| u.name == command.user) {
            Some(user) => Some(user.clone()),
            None => read_user(self.engine, &command.user)?,
        };
        match user {
            Some(user) if user.root => Ok(()),
            _ => Err(Failed::PermissionDenied),
        }
    }

    fn check_put(&self, request: &PutRequest) -> Result<(), Failed> {
        if request.lease != 0 {
            return Err(Failed::LeaseNotFound);
        }
        if (request.ignore_value || request.ignore_lease)
            && self.view().get(&request.key)?.is_none()
        {
            return Err(Failed::KeyNotFound);
        }
        Ok(())
    }

    fn put(&mut self, request: PutRequest) -> Result<PutResponse, Failed> {
        let revision = self.state.revision + 1;
        // The record itself is read only where its value or lease is asked for.
        let known = match request.ignore_value || request.ignore_lease || request.prev_kv {
            true => None,
            false => self.latest.get(&request.key),
        };
        let previous = match known {
            Some(_) => None,
            None => self.view().get(&request.key)?,
        };
        let known = known.or_else(|| {
            previous.as_ref().map(|p| Known {
                create: p.create,
                version: p.version,
                hash: self.hasher.hash(&request.key, &p.encode()),
            })
        });
        let value = match &previous {
            Some(previous) if request.ignore_value => previous.value.clone(),
            _ => request.value,
        };
        let lease = match &previous {
            Some(previous) if request.ignore_lease => previous.lease,
            _ => request.lease,
        };
        let record = Record {
            create: known.map_or(revision, |k| k.create),
            modified: revision,
            version: known.map_or(1, |k| k.version + 1),
            lease,
            value,
        };
        let row = record.encode();
        let hash = self.hasher.hash(&request.key, &row);
        if let Some(known) = known {
            self.state.digests.keys.subtract(known.hash);
        }
        self.state.digests.keys.add(hash);
        self.latest.put(
            &request.key,
            Known {
                create: record.create,
                version: record.version,
                hash,
            },
        );
        self.state.bytes += (request.key.len() + record.value.len()) as u64;
        self.batch
            .put_cf(self.engine.cf(Cf::Kv), &request.key, &row);
        let event = Event::encode_put(&request.key, &row);
        self.event(revision, PUT, &request.key, &event);
        self.overlay
            .push(revision, request.key.clone(), Some(record));
        let prev_kv = previous
            .filter(|_| request.prev_kv)
            .map(|p| p.into_key_value(request.key));
        Ok(PutResponse {
            header: header(revision),
            prev_kv,
        })
    }

    /// Writes the event's rows of `rev` and `hist`.
    fn event(&mut self, revision: i64, kind: u8, user_key: &[u8], event: &[u8]) {
        let mut history = [kind, 0, 0, 0, 0];
        history[1..].copy_from_slice(&self.sub.to_be_bytes());
        self.batch
            .put_cf(self.engine.cf(Cf::Rev), key::rev(revision, self.sub), event);
        self.batch.put_cf(
            self.engine.cf(Cf::Hist),
            key::hist(user_key, revision),
            history,
        );
        self.sub += 1;
    }

    fn delete_range(
        &mut self,
        request: &DeleteRangeRequest,
    ) -> Result<DeleteRangeResponse, Failed> {
        let revision = self.state.revision + 1;
        let range = KeyRange::new(&request.key, &request.range_end);
        let found = self.view().scan(&range, self.revision(), 0)?;
        let mut prev_kvs = Vec::new();
        for (key, record) in found.rows {
            let hash = self.hasher.hash(&key, &record.encode());
            self.state.digests.keys.subtract(hash);
            self.latest.remove(&key);
            self.state.bytes += key.len() as u64;
            self.batch.delete_cf(self.engine.cf(Cf::Kv), &key);
            self.event(revision, DELETE, &key, &Event::encode_delete(&key));
            self.overlay.push(revision, key.clone(), None);
            if request.prev_kv {
                prev_kvs.push(record.into_key_value(key));
            }
        }
        Ok(DeleteRangeResponse {
            header: header(self.revision()),
            deleted: found.count,
            prev_kvs,
        })
    }

    fn txn(&mut self, request: &TxnRequest) -> Result<TxnResponse, Failed> {
        let mut path = Vec::new();
        decide(&self.view(), self.revision(), request, &mut path)?;
        // Nothing is written before the whole of the taken path is known to be possible.
        self.check_path(request, &mut path.iter())?;
        let mut response = run(request, &mut path.iter(), &mut |one| self.one(one))?;
        response.header = header(self.revision());
        Ok(response)
    }

    fn check_path(
        &self,
        request: &TxnRequest,
        path: &mut std::slice::Iter<'_, bool>,
    ) -> Result<(), Failed> {
        let holds = *path.next().expect("decide visits every txn on the path");
        for op in branch(request, holds) {
            match &op.request {
                Some(Request::RequestRange(r)) => self.state.bounds().check(r.revision)?,
                Some(Request::RequestPut(r)) => self.check_put(r)?,
                Some(Request::RequestTxn(nested)) => self.check_path(nested, path)?,
                Some(Request::RequestDeleteRange(_)) | None => {}
            }
        }
        Ok(())
    }

    /// One request of a txn's branch.
    fn one(&mut self, request: &Request) -> Result<Option<Response>, Failed> {
        Ok(match request {
            Request::RequestRange(r) => {
                let bounds = range::Bounds {
                    revision: self.revision(),
                    compacted: self.state.compacted,
                };
                let answer = range::range(&self.view(), bounds, r)?;
                Some(Response::ResponseRange(answer))
            }
            Request::RequestPut(r) => Some(Response::ResponsePut(self.put(r.clone())?)),
            Request::RequestDeleteRange(r) => {
                Some(Response::ResponseDeleteRange(self.delete_range(r)?))
            }
            Request::RequestTxn(_) => None,
        })
    }

    fn compact(&mut self, request: &CompactionRequest) -> Result<CompactionResponse, Failed> {
        if request.revision <= self.state.compacted {
            return Err(Failed::Compacted);
        }
        if request.revision > self.state.revision {
            return Err(Failed::FutureRevision);
        }
        self.state.compacted = request.revision;
        Ok(CompactionResponse {
            header: header(self.state.revision),
        })
    }

    fn put_user(&mut self, request: PutUser) -> Result<(), Failed> {
        let user = User {
            name: request.name,
            password_hash: request.password_hash,
            root: request.root,
        };
        let key = user_key(&user.name);
        let row = user.encode_to_vec();
        let previous = match self.users.iter().rev().find(|u| u.name == user.name) {
            Some(previous) => Some(previous.encode_to_vec()),
            None => self.engine.get(Cf::Auth, &key)?,
        };
        if let Some(previous) = previous {
            let hash = self.hasher.hash(&key, &previous);
            self.state.digests.auth.subtract(hash);
        }
        self.state.digests.auth.add(self.hasher.hash(&key, &row));
        self.batch.put_cf(self.engine.cf(Cf::Auth), &key, row);
        self.state.auth_revision += 1;
        self.users.push(user);
        Ok(())
    }
}

/// Checks a command as a gateway does before it is proposed.
pub fn check_command(op: &Op) -> Result<(), Failed> {
    match op {
        Op::Put(r) => check::put(r),
        Op::DeleteRange(r) => check::delete_key(&r.key),
        Op::Txn(r) => check::txn(r),
        Op::Compact(_) | Op::PutUser(_) => Ok(()),
    }
}
