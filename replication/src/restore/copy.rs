//! A restored state as the beginning of another tenant: every row under that tenant's keys.
//!
//! Invariants. Rows are what they were; digests are counted anew as they are copied, under the new
//! tenant's secret, and again from what was written. The new chain begins with a link that stands
//! where the state does, and a checkpoint that covers it: without that checkpoint nothing of what was
//! copied can be restored.

use std::path::Path;
use std::sync::Arc;

use kms::TenantKeys;

use super::replay::Rebuilt;
use super::{RestoreError, Restored, first_link, io};
use crate::GroupId;
use crate::archive::chain::{Chain, Created, Tail};
use crate::archive::checkpoint::{self, Manifest};
use crate::engine::{Budget, Cf, Engine, EngineError};
use crate::group::founding::Founder;
use crate::group::replica::open_files;
use crate::machine::Store;
use crate::mvcc::digest::{Digests, Hasher};

/// Bytes written at once.
const BATCH: usize = 1 << 20;

impl Rebuilt {
    /// Copies it into `dir`, which must not exist, as the state that `group` begins with; goes on
    /// while `go_on` says so.
    pub fn copy_to(
        self,
        group: GroupId,
        founder: &Founder,
        keys: Arc<TenantKeys>,
        budget: &Budget,
        dir: &Path,
        go_on: impl Fn() -> bool,
    ) -> Result<Restored, RestoreError> {
        tokio::task::block_in_place(|| {
            std::fs::create_dir(dir).map_err(io(dir))?;
            let hasher = Hasher::new(&keys);
            let engine = Engine::open(&dir.join("engine"), keys, budget)?;
            let from = self.store().engine()?;
            let mut state = self.state;
            state.digests = Digests::default();
            for cf in Cf::ALL {
                let digest = match cf {
                    Cf::Kv => Some(&mut state.digests.keys),
                    Cf::Auth => Some(&mut state.digests.auth),
                    Cf::Lease => Some(&mut state.digests.leases),
                    Cf::Rev | Cf::Hist => None,
                    // Where it stands, which is written below, and members, which are others.
                    Cf::Meta => continue,
                };
                let hash = |key: &[u8], row: &[u8]| hasher.hash(key, row);
                let mut digest = digest;
                copy(&from, &engine, cf, |key, row| {
                    if let Some(digest) = digest.as_deref_mut() {
                        digest.add(hash(key, row));
                    }
                    go_on()
                })?;
            }
            let store = Store::open(engine)?;
            let (found, _) = store.scan_digests(&hasher, |_| go_on())?;
            if found != state.digests {
                return Err(RestoreError::Digest {
                    found: found.keys,
                    wanted: state.digests.keys,
                });
            }
            Restored::of(group, &store, state, founder, dir.join("checkpoint"))
        })
    }
}

fn copy(
    from: &Engine,
    to: &Engine,
    cf: Cf,
    mut each: impl FnMut(&[u8], &[u8]) -> bool,
) -> Result<(), RestoreError> {
    let mut options = rocksdb::ReadOptions::default();
    options.fill_cache(false);
    options.set_verify_checksums(true);
    let mut rows = from.db().raw_iterator_cf_opt(from.cf(cf), options);
    rows.seek_to_first();
    let mut batch = rocksdb::WriteBatch::default();
    while let Some((key, row)) = rows.item() {
        if !each(key, row) {
            return Err(RestoreError::Stopped);
        }
        batch.put_cf(to.cf(cf), key, row);
        if batch.size_in_bytes() >= BATCH {
            to.write(std::mem::take(&mut batch))?;
        }
        rows.next();
    }
    rows.status().map_err(EngineError::from)?;
    Ok(to.write(batch)?)
}

/// Begins the chain of a tenant that was copied: a link that stands where it does, and its state. Answers
/// that link.
pub async fn begin_chain(
    chain: &Chain,
    copied: &Restored,
    restore: &str,
) -> Result<Tail, RestoreError> {
    let header = first_link(copied, None, restore);
    let tail = match chain.create(&Tail::default(), header, &[]).await? {
        Created::Ours(tail) => tail,
        Created::Theirs(_) => return Err(RestoreError::Lost(chain.group().incarnation)),
    };
    let behind = (tail.number, tail.hash.clone());
    let manifest = Manifest::new(chain.group(), &copied.state, copied.position, behind);
    let files = open_files(&copied.checkpoint).map_err(io(&copied.checkpoint))?;
    checkpoint::upload(chain, files, manifest).await?;
    Ok(*tail)
}
