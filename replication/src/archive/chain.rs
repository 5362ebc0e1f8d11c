//! Reading and extending a chain, exclusively.

use std::sync::Arc;

use bytes::Bytes;
use futures::TryStreamExt;
use kms::Secret;
use object_store::path::Path;
use object_store::{ObjectStore, ObjectStoreExt, PutMode, PutPayload};
use thiserror::Error;

use super::bucket::{chain_dir, link_path};
use super::checkpoint;
use super::link::{self, Closed, Header, Link, LinkError};
use crate::GroupId;

#[derive(Debug, Error)]
pub enum ChainError {
    #[error("object {object}: {cause}")]
    Store {
        object: String,
        cause: object_store::Error,
    },
    #[error("object {0} is missing")]
    Missing(String),
    #[error("object {object} is refused: {cause}")]
    Refused { object: String, cause: LinkError },
    #[error("object {object} does not follow the link before it")]
    Broken { object: String },
    #[error("the chain was closed by a restore, which went on as incarnation {0}")]
    Closed(u32),
    #[error("object {object} was written under term {theirs}, above this writer's {ours}")]
    Superseded {
        object: String,
        theirs: u64,
        ours: u64,
    },
}

/// The end of a chain, as far as it is known.
#[derive(Clone, Debug, Default)]
pub struct Tail {
    /// 0: the chain is empty.
    pub number: u64,
    pub hash: String,
    pub header: Option<Header>,
}

impl Tail {
    pub fn last_index(&self) -> u64 {
        self.header
            .as_ref()
            .and_then(|h| h.last)
            .map_or(0, |at| at.index)
    }

    pub fn closed(&self) -> Option<&Closed> {
        self.header.as_ref()?.closed.as_ref()
    }
}

impl From<&Link> for Tail {
    fn from(link: &Link) -> Self {
        Tail {
            number: link.header.number,
            hash: link.hash.clone(),
            header: Some(link.header.clone()),
        }
    }
}

/// How a chain ends: its newest link, and the manifests of its checkpoints, newest first.
#[derive(Clone, Debug, Default)]
pub struct End {
    pub tail: Tail,
    pub manifests: Vec<Path>,
}

/// What came of trying to create the next link.
pub enum Created {
    Ours(Box<Tail>),
    /// Another's link stands there.
    Theirs(Box<Link>),
}

/// The chain of one group in the bucket.
#[derive(Clone)]
pub struct Chain {
    bucket: Arc<dyn ObjectStore>,
    key: Secret,
    group: GroupId,
}

impl Chain {
    /// `key`: the region's archive key.
    pub fn new(bucket: Arc<dyn ObjectStore>, key: Secret, group: GroupId) -> Self {
        Chain { bucket, key, group }
    }

    pub fn group(&self) -> GroupId {
        self.group
    }

    /// The same tenant's chain of another incarnation.
    pub fn of(&self, incarnation: u32) -> Self {
        let group = GroupId {
            incarnation,
            ..self.group
        };
        Chain::new(self.bucket.clone(), self.key.clone(), group)
    }

    pub fn bucket(&self) -> &Arc<dyn ObjectStore> {
        &self.bucket
    }

    pub fn key(&self) -> &Secret {
        &self.key
    }

    /// Numbers of the links above `after`, in order.
    pub async fn numbers(&self, after: u64) -> Result<Vec<u64>, ChainError> {
        let sizes = self.sizes(after).await?;
        Ok(sizes.into_iter().map(|(number, _)| number).collect())
    }

    /// Numbers and sizes in bytes of the links above `after`, in order.
    pub async fn sizes(&self, after: u64) -> Result<Vec<(u64, u64)>, ChainError> {
        let dir = chain_dir(self.group);
        let offset = link_path(self.group, after);
        let found: Vec<_> = self
            .bucket
            .list_with_offset(Some(&dir), &offset)
            .try_collect()
            .await
            .map_err(|cause| ChainError::Store {
                object: dir.to_string(),
                cause,
            })?;
        let size = |meta: &object_store::ObjectMeta| {
            let number = meta.location.filename()?.parse().ok()?;
            Some((number, meta.size))
        };
        let mut sizes: Vec<(u64, u64)> = found.iter().filter_map(size).collect();
        sizes.sort_unstable();
        Ok(sizes)
    }

    /// An object of the chain, as it is.
    pub(super) async fn get(&self, path: &Path) -> Result<Bytes, ChainError> {
        let store = |cause| match cause {
            object_store::Error::NotFound { .. } => ChainError::Missing(path.to_string()),
            cause => ChainError::Store {
                object: path.to_string(),
                cause,
            },
        };
        let got = self.bucket.get(path).await.map_err(store)?;
        got.bytes().await.map_err(store)
    }

    pub async fn read(&self, number: u64) -> Result<Link, ChainError> {
        let path = link_path(self.group, number);
        let bytes = self.get(&path).await?;
        link::decode(&self.key, self.group, number, &bytes).map_err(|cause| ChainError::Refused {
            object: path.to_string(),
            cause,
        })
    }

    /// Listing is the only way to find the newest link: from the newest checkpoint on, since a chain can
    /// have many links.
    pub async fn end(&self) -> Result<End, ChainError> {
        let manifests = checkpoint::list(&self.bucket, self.group).await?;
        let from = manifests.first().and_then(checkpoint::link_of).unwrap_or(0);
        let tail = match self.numbers(from.saturating_sub(1)).await?.last() {
            Some(number) => Tail::from(&self.read(*number).await?),
            None => Tail::default(),
        };
        Ok(End { tail, manifests })
    }

    /// The newest link.
    pub async fn tail(&self) -> Result<Tail, ChainError> {
        Ok(self.end().await?.tail)
    }

    /// Checks that `link` follows `before`.
    pub fn check_follows(&self, before: &Tail, link: &Link) -> Result<(), ChainError> {
        let follows =
            link.header.number == before.number + 1 && link.header.previous == before.hash;
        if follows {
            return Ok(());
        }
        Err(ChainError::Broken {
            object: link_path(self.group, link.header.number).to_string(),
        })
    }

    /// Creates the link after `before`. An answer that was lost is found by reading back: own
    /// bytes are success.
    pub async fn create(
        &self,
        before: &Tail,
        mut header: Header,
        entries: &[Bytes],
    ) -> Result<Created, ChainError> {
        header.group = self.group;
        header.number = before.number + 1;
        header.previous = before.hash.clone();
        header.entries = entries.len() as u32;
        let bytes = Bytes::from(link::encode(&self.key, &header, entries));
        let hash = link::hash(&bytes);
        let path = link_path(self.group, header.number);
        let put = self
            .bucket
            .put_opts(&path, PutPayload::from(bytes), PutMode::Create.into())
            .await;
        let ours = |header: Header| {
            Created::Ours(Box::new(Tail {
                number: header.number,
                hash: hash.clone(),
                header: Some(header),
            }))
        };
        match put {
            Ok(_) => Ok(ours(header)),
            Err(object_store::Error::AlreadyExists { .. }) => {
                let theirs = self.read(header.number).await?;
                match theirs.hash == hash {
                    true => Ok(ours(header)),
                    false => Ok(Created::Theirs(Box::new(theirs))),
                }
            }
            Err(cause) => Err(ChainError::Store {
                object: path.to_string(),
                cause,
            }),
        }
    }

    /// Whether another's link can be gone on after by a writer of `term`: it holds committed
    /// entries of this incarnation and was not written under a later term.
    pub fn adopt(&self, before: &Tail, theirs: &Link, term: u64) -> Result<Tail, ChainError> {
        self.check_follows(before, theirs)?;
        if let Some(closed) = &theirs.header.closed {
            return Err(ChainError::Closed(closed.incarnation));
        }
        if theirs.header.term > term {
            return Err(ChainError::Superseded {
                object: link_path(self.group, theirs.header.number).to_string(),
                theirs: theirs.header.term,
                ours: term,
            });
        }
        Ok(Tail::from(theirs))
    }
}
