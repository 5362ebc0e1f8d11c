//! Prometheus metrics. Tenants are named by id, never by what they hold.

use std::sync::LazyLock;

use prometheus::{Encoder, GaugeVec, IntCounter, Opts, Registry, TextEncoder};
use replication::group::Role;

use crate::node::Node;

pub static DIGEST_DIFFERENCES: LazyLock<IntCounter> = LazyLock::new(|| {
    IntCounter::new(
        "holdfast_digest_differences_total",
        "Comparisons of replicas' digests that differed: any is an alarm",
    )
    .expect("a constant name is valid")
});

/// Reads the figures of every group as they are now.
pub fn text(node: &Node) -> String {
    let registry = Registry::new();
    let gauge = |name: &str, help: &str| {
        let gauge = GaugeVec::new(Opts::new(name, help), &["tenant", "incarnation"])
            .expect("a constant name is valid");
        let _ = registry.register(Box::new(gauge.clone()));
        gauge
    };
    let _ = registry.register(Box::new(DIGEST_DIFFERENCES.clone()));
    let rpo = gauge(
        "holdfast_rpo_seconds",
        "Age of the oldest acknowledged write that is not in the bucket",
    );
    let contracted = gauge("holdfast_rpo_contract_seconds", "RPO of the contract");
    let applied = gauge("holdfast_applied_index", "Last log index applied");
    let archived = gauge(
        "holdfast_archived_index",
        "Last log index in the bucket, as known here",
    );
    let leader = gauge("holdfast_leader", "1 where this node leads the group");
    let bytes = gauge("holdfast_bytes", "Bytes of keys and values of all versions");
    for group in node.parts.groups.all() {
        let status = group.status();
        let tenant = status.group.tenant.to_string();
        let incarnation = status.group.incarnation.to_string();
        let labels = [tenant.as_str(), incarnation.as_str()];
        rpo.with_label_values(&labels)
            .set(status.rpo_ms as f64 / 1000.0);
        applied
            .with_label_values(&labels)
            .set(status.applied as f64);
        archived
            .with_label_values(&labels)
            .set(status.archived as f64);
        leader
            .with_label_values(&labels)
            .set(f64::from(u8::from(status.role == Role::Leader)));
        bytes.with_label_values(&labels).set(status.bytes as f64);
    }
    for tenant in node.tenants.all() {
        let record = tenant.record();
        let (id, incarnation) = (record.id.to_string(), record.incarnation.to_string());
        let labels = [id.as_str(), incarnation.as_str()];
        contracted
            .with_label_values(&labels)
            .set(record.rpo_ms as f64 / 1000.0);
    }
    let mut out = Vec::new();
    let _ = TextEncoder::new().encode(&registry.gather(), &mut out);
    String::from_utf8_lossy(&out).into_owned()
}
