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
    let sealed = gauge(
        "holdfast_sealed",
        "1 where the tenant is sealed on this node: its key may not be used",
    );
    let proof = gauge(
        "holdfast_key_proof_age_seconds",
        "Since the KMS was asked and last proved the tenant's key usable",
    );
    let took = gauge(
        "holdfast_seal_seconds",
        "From the KMS's last refusal to this node to the tenant being sealed here",
    );
    let calls = IntCounter::new("holdfast_kms_calls_total", "Calls to KMS providers")
        .expect("a constant name is valid");
    calls.inc_by(node.parts.providers.calls());
    let _ = registry.register(Box::new(calls));
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
        let group = tenant.group().ok();
        let report = tenant.key.report("", group.as_deref());
        let is_sealed = group.is_some() && report.sealed.is_some();
        sealed
            .with_label_values(&labels)
            .set(f64::from(u8::from(is_sealed)));
        // A key is proven where its tenant is open and not sealed.
        if group.is_some() && !is_sealed {
            proof
                .with_label_values(&labels)
                .set(report.proof_age_ms as f64 / 1000.0);
        }
        if report.sealed_ms >= report.refused_ms && report.refused_ms > 0 {
            let ms = report.sealed_ms - report.refused_ms;
            took.with_label_values(&labels).set(ms as f64 / 1000.0);
        }
        contracted
            .with_label_values(&labels)
            .set(record.rpo_ms as f64 / 1000.0);
    }
    let mut out = Vec::new();
    let _ = TextEncoder::new().encode(&registry.gather(), &mut out);
    String::from_utf8_lossy(&out).into_owned()
}
