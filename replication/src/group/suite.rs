//! openraft's own storage test suite, on the node's log and the state machine.

use std::sync::Arc;

use kms::{Secret, TenantId, TenantKeys};
use openraft::StorageError;
use openraft::testing::log::{StoreBuilder, Suite};
use openraft::type_config::TypeConfigExt;

use super::replica::ReplicaDir;
use super::sealing::Replica;
use super::state_machine::StateMachine;
use super::types::TypeConfig;
use crate::GroupId;
use crate::engine::{Budget, Ciphering};
use crate::log::{GroupLog, NodeLog};

struct Builder;

fn build() -> Result<(tempfile::TempDir, GroupLog, StateMachine), Box<dyn std::error::Error>> {
    let dir = tempfile::tempdir()?;
    let id = GroupId {
        tenant: TenantId([7; 16]),
        incarnation: 1,
    };
    // One key for all: the suite installs one store's snapshot in another.
    let key = Secret::from_slice(&[9; 32]).ok_or("32 bytes")?;
    let keys = Arc::new(TenantKeys::new(id.tenant, key.clone(), [(1, key)]));
    let budget = Budget::new(64 << 20, 8 << 20, Ciphering::Encrypted);
    let log = NodeLog::open(&dir.path().join("log"))?;
    let replica = ReplicaDir::open(&dir.path().join("replica"))?;
    let log = log.group(id);
    let replica = Replica::open(id, replica, budget, log.reader(), Ok(keys))?;
    Ok((dir, log, StateMachine(replica)))
}

impl StoreBuilder<TypeConfig, GroupLog, StateMachine, tempfile::TempDir> for Builder {
    async fn build(
        &self,
    ) -> Result<(tempfile::TempDir, GroupLog, StateMachine), StorageError<TypeConfig>> {
        build().map_err(|e| StorageError::write(TypeConfig::err_from_string(e.to_string())))
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn openraft_storage_suite() {
    Suite::test_all(Builder).await.unwrap();
}
