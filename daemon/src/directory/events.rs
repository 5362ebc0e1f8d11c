//! Events: what operators must be able to look up afterwards. Kept in the directory, newest
//! `limits::MAX_EVENTS`; each is logged when it happens as well.

use std::collections::{HashSet, VecDeque};
use std::sync::Arc;
use std::time::Duration;

use parking_lot::Mutex;
use tokio::sync::Notify;

use super::records::{EventKind, EventRecord, TenantRecord};
use crate::limits;
use crate::node::Node;
use crate::tenant::key::now_ms;

const AGAIN: Duration = Duration::from_secs(1);

/// Events on their way to the directory.
#[derive(Default)]
pub struct Pending {
    queue: Mutex<VecDeque<EventRecord>>,
    /// Places that were refused.
    refused: Mutex<HashSet<String>>,
    more: Notify,
}

impl Node {
    /// Records an event of a tenant, as soon as the directory takes it.
    pub fn event(&self, tenant: &TenantRecord, kind: EventKind, detail: String) {
        self.event_of(&tenant.name, kind, detail);
    }

    /// Something outside the jurisdiction was refused that is no single tenant's: a peer, the bucket.
    /// Each once, so that whoever tries again and again does not push the other events out.
    pub fn refused_place(&self, why: String) {
        let mut known = self.events.refused.lock();
        if known.len() < limits::MAX_EVENTS && known.insert(why.clone()) {
            self.event_of("", EventKind::ResidencyRefused, why);
        }
    }

    /// As `event`, of a tenant that there may be no record of.
    pub fn event_of(&self, tenant: &str, kind: EventKind, detail: String) {
        let event = EventRecord {
            at_ms: now_ms(),
            node: self.config.name.clone(),
            tenant: tenant.to_string(),
            kind,
            detail,
        };
        tracing::info!(tenant, kind = kind.name(), detail = event.detail, "event");
        let mut queue = self.events.queue.lock();
        // A directory that is away for long must not fill the memory.
        if queue.len() >= limits::MAX_EVENTS {
            queue.pop_front();
        }
        queue.push_back(event);
        drop(queue);
        self.events.more.notify_one();
    }
}

/// Writes events to the directory, oldest first, each until it is taken.
pub async fn keep(node: Arc<Node>) {
    loop {
        let next = node.events.queue.lock().front().cloned();
        let Some(event) = next else {
            node.events.more.notified().await;
            continue;
        };
        let Some(directory) = node.directory() else {
            tokio::time::sleep(AGAIN).await;
            continue;
        };
        match directory.put_event(&event).await {
            Ok(()) => drop(node.events.queue.lock().pop_front()),
            Err(e) => {
                tracing::debug!(error = %e, "an event is not recorded yet");
                tokio::time::sleep(AGAIN).await;
                continue;
            }
        }
        if let Err(e) = directory.drop_old_events().await {
            tracing::debug!(error = %e, "old events are not removed yet");
        }
    }
}
