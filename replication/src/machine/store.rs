//! What apply writes and requests read: an engine and the state it stands at, together.
//!
//! A reader holds the read lock only while it takes a snapshot, so that rows and revision belong
//! together; apply holds the write lock while it writes a batch. Installing a snapshot replaces
//! the engine; readers finish on the old one. While the tenant is sealed there is no engine, and
//! entries pass unapplied: what is read then is an error.

use std::sync::Arc;

use bytes::Bytes;
use parking_lot::RwLock;
use prost::Message;
use tokio::sync::watch;

use super::state::State;
use crate::Position;
use crate::engine::{Cf, Engine, EngineError};
use crate::mvcc::check::Failed;
use crate::mvcc::digest::{Digests, Hasher};
use crate::mvcc::range;
use crate::mvcc::record::Record;
use crate::mvcc::view::View;
use crate::proto::command::User;
use crate::proto::etcdserverpb::{RangeRequest, RangeResponse, TxnRequest, TxnResponse};

struct Inner {
    /// None while the tenant is sealed.
    engine: Option<Arc<Engine>>,
    /// As it was last known.
    state: State,
}

impl Inner {
    fn engine(&self) -> Result<&Arc<Engine>, EngineError> {
        self.engine.as_ref().ok_or(EngineError::Sealed)
    }
}

/// Where a replica stands.
#[derive(Clone, Debug, Default)]
pub struct Standing {
    /// The last entry that was applied, or passed while sealed: it is committed either way.
    pub position: Option<Position>,
    /// The state there; none while sealed.
    pub state: Option<State>,
}

impl From<&State> for Standing {
    fn from(state: &State) -> Self {
        Standing {
            position: state.applied,
            state: Some(state.clone()),
        }
    }
}

impl Standing {
    pub fn index(&self) -> u64 {
        self.position.map_or(0, |at| at.index)
    }
}

/// The readable state of one tenant's replica.
pub struct Store {
    inner: RwLock<Inner>,
    standing: watch::Sender<Standing>,
}

impl Store {
    pub fn open(engine: Engine) -> Result<Self, EngineError> {
        let store = Self::sealed();
        store.replace(engine)?;
        Ok(store)
    }

    /// A store without an engine, until `replace` gives it one.
    pub fn sealed() -> Self {
        Store {
            standing: watch::Sender::default(),
            inner: RwLock::new(Inner {
                engine: None,
                state: State::empty(),
            }),
        }
    }

    pub fn state(&self) -> State {
        self.inner.read().state.clone()
    }

    pub fn engine(&self) -> Result<Arc<Engine>, EngineError> {
        self.inner.read().engine().cloned()
    }

    /// Changes whenever something was applied, or passed.
    pub fn watch(&self) -> watch::Receiver<Standing> {
        self.standing.subscribe()
    }

    /// Lets go of the engine; it closes once its last reader is done.
    pub fn close(&self) {
        self.inner.write().engine = None;
    }

    /// Entries up to `position` are committed and pass unapplied.
    pub fn pass(&self, position: Option<Position>) {
        self.standing.send_replace(Standing {
            position,
            state: None,
        });
    }

    /// Writes what apply has gathered and moves the state with it.
    pub(super) fn commit(
        &self,
        batch: rocksdb::WriteBatch,
        state: State,
    ) -> Result<(), EngineError> {
        let mut inner = self.inner.write();
        inner.engine()?.write(batch)?;
        inner.state = state.clone();
        drop(inner);
        self.standing.send_replace(Standing::from(&state));
        Ok(())
    }

    /// Moves the state without rows: a restore's step to the next incarnation.
    pub fn set_state(&self, state: State) -> Result<(), EngineError> {
        let mut batch = rocksdb::WriteBatch::default();
        state.write(&*self.engine()?, &mut batch);
        self.commit(batch, state)
    }

    /// Says who is of the group that begins here.
    pub fn set_membership(&self, membership: &[u8]) -> Result<(), EngineError> {
        let engine = self.engine()?;
        let mut batch = rocksdb::WriteBatch::default();
        State::write_membership(&engine, &mut batch, membership);
        engine.write(batch)
    }

    /// Puts another engine in the place of the present one.
    pub fn replace(&self, engine: Engine) -> Result<(), EngineError> {
        let state = State::read(&engine)?;
        let standing = Standing::from(&state);
        let mut inner = self.inner.write();
        inner.engine = Some(Arc::new(engine));
        inner.state = state;
        drop(inner);
        self.standing.send_replace(standing);
        Ok(())
    }

    /// Runs `read` on a consistent view.
    pub fn view<T, E: From<EngineError>>(
        &self,
        read: impl FnOnce(&View<'_>, &State) -> Result<T, E>,
    ) -> Result<T, E> {
        let inner = self.inner.read();
        let engine = inner.engine()?.clone();
        let state = inner.state.clone();
        let snapshot = engine.db().snapshot();
        drop(inner);
        let view = View {
            engine: &engine,
            snapshot: Some(snapshot),
            revision: state.revision,
            overlay: None,
        };
        read(&view, &state)
    }

    /// Answers a Range from this replica as it stands.
    pub fn range(&self, request: &RangeRequest) -> Result<RangeResponse, Failed> {
        // One key, now: a point read under the lock is cheaper than a snapshot.
        if request.range_end.is_empty() && request.revision <= 0 {
            let inner = self.inner.read();
            let view = View {
                engine: inner.engine()?,
                snapshot: None,
                revision: inner.state.revision,
                overlay: None,
            };
            return range::range(&view, inner.state.bounds(), request);
        }
        self.view(|view, state| range::range(view, state.bounds(), request))
    }

    /// Bytes that the quota counts.
    pub fn bytes(&self) -> u64 {
        self.inner.read().state.bytes
    }

    pub fn auth_revision(&self) -> u64 {
        self.inner.read().state.auth_revision
    }

    /// Answers a txn that changes nothing, from this replica as it stands.
    pub fn read_txn(&self, request: &TxnRequest) -> Result<TxnResponse, Failed> {
        self.view(|view, state| super::txn::read_txn(view, state, request))
    }

    /// A user of the tenant.
    pub fn user(&self, name: &str) -> Result<Option<User>, EngineError> {
        read_user(&*self.engine()?, name)
    }

    /// Up to `count` live keys with their records, each as likely as any other. Reads every row, as
    /// long as `go_on` says so.
    pub fn sample(
        &self,
        count: usize,
        go_on: impl Fn() -> bool,
    ) -> Result<Vec<(Bytes, Record)>, EngineError> {
        self.view(|view, _| {
            let mut rows = view.engine.db().raw_iterator_cf(view.engine.cf(Cf::Kv));
            let mut sampled = Vec::with_capacity(count);
            let mut seen = 0u64;
            rows.seek_to_first();
            while let Some((key, row)) = rows.item().filter(|_| go_on()) {
                seen += 1;
                let draw = u64::from_be_bytes(kms::secret::random_bytes()) % seen;
                let at = match sampled.len() < count {
                    true => sampled.len(),
                    false => draw as usize,
                };
                if at < count {
                    let record = Record::decode(row).ok_or(EngineError::Damaged("a record"))?;
                    let one = (Bytes::copy_from_slice(key), record);
                    match sampled.get_mut(at) {
                        Some(place) => *place = one,
                        None => sampled.push(one),
                    }
                }
                rows.next();
            }
            rows.status()?;
            Ok(sampled)
        })
    }

    /// Counts the digests anew from every row of a snapshot, and says at which state. Rate-limited
    /// by the caller through `pace`, which is called for each row and says whether to go on.
    pub fn scan_digests(
        &self,
        hasher: &Hasher,
        mut pace: impl FnMut(usize) -> bool,
    ) -> Result<(Digests, State), EngineError> {
        self.view(|view, state| {
            let mut digests = Digests::default();
            for (cf, digest) in [
                (Cf::Kv, &mut digests.keys),
                (Cf::Auth, &mut digests.auth),
                (Cf::Lease, &mut digests.leases),
            ] {
                let mut options = rocksdb::ReadOptions::default();
                if let Some(snapshot) = &view.snapshot {
                    options.set_snapshot(snapshot);
                }
                options.fill_cache(false);
                options.set_verify_checksums(true);
                let mut rows = view
                    .engine
                    .db()
                    .raw_iterator_cf_opt(view.engine.cf(cf), options);
                rows.seek_to_first();
                while let Some((key, row)) = rows.item() {
                    digest.add(hasher.hash(key, row));
                    if !pace(key.len() + row.len()) {
                        return Err(EngineError::Sealed);
                    }
                    rows.next();
                }
                rows.status()?;
            }
            Ok((digests, state.clone()))
        })
    }
}

pub(super) fn read_user(engine: &Engine, name: &str) -> Result<Option<User>, EngineError> {
    match engine.get(Cf::Auth, &user_key(name))? {
        Some(row) => User::decode(row.as_slice())
            .map(Some)
            .map_err(|_| EngineError::Damaged("user")),
        None => Ok(None),
    }
}

pub(super) fn user_key(name: &str) -> Vec<u8> {
    [b"u/", name.as_bytes()].concat()
}
