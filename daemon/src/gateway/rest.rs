//! Services of etcd that are not built yet: their calls answer UNIMPLEMENTED.

use crate::proto::etcd::lease_server::Lease;
use crate::proto::etcd::watch_server::Watch;

pub struct Later;

impl Watch for Later {}
impl Lease for Later {}
