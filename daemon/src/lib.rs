//! The daemon: the service around the data path.
//!
//! `node` is one node of a region: its log, peers, groups, directory and servers. `gateway` speaks
//! etcd v3 to clients, `admin` speaks to operators, `directory` keeps what the region knows of
//! itself, `tenant` opens what is placed here, `drill`
//! proves that it can be restored.

pub mod admin;
pub mod admin_client;
mod checkpoint;
pub mod config;
pub mod dev;
pub mod directory;
pub mod drill;
pub mod gateway;
pub mod limits;
pub mod logging;
pub mod node;
pub mod objectives;
pub mod pki;
mod question;
mod region;
pub mod residency;
pub mod retention;
pub mod scrub;
pub mod server;
pub mod signed;
pub mod tenant;

/// Services compiled from `proto/`.
#[allow(clippy::all, clippy::unwrap_used, missing_docs, rustdoc::all)]
pub mod proto {
    pub mod etcd {
        tonic::include_proto!("etcdserverpb");
    }
    pub mod admin {
        tonic::include_proto!("holdfast.admin");
    }
    pub mod health {
        tonic::include_proto!("grpc.health.v1");
    }
}
