//! Controllers: they watch the directory and reconcile what is with what is recorded.

use std::collections::{BTreeMap, HashMap};
use std::sync::Arc;
use std::time::Duration;

use kms::{TenantId, TenantKeys};
use replication::engine::EngineError;
use replication::group::replica::is_quarantined;
use replication::group::{Group, ScanError};

use super::Directory;
use super::records::{EventKind, NodeRecord, TenantRecord};
use crate::limits;
use crate::node::Node;
use crate::tenant::{Opening, Parts, Tenant, keeper, reason, rebuilding, wrapped};

const RETRY: Duration = Duration::from_millis(500);
const RECORDS: Duration = Duration::from_secs(2);
const MEMBERS: Duration = Duration::from_secs(1);
const DIGESTS: Duration = Duration::from_secs(10);

/// Opens the tenants that are placed on this node, and those of a new incarnation.
pub async fn open_tenants(node: Arc<Node>) {
    let Some(directory) = node.directory() else {
        return;
    };
    let mut changes = directory.group().store().watch();
    loop {
        let mut skipped = false;
        match directory.tenants() {
            Ok(found) => {
                let ids: Vec<TenantId> = found.iter().map(|f| f.record.id).collect();
                node.tenants.retain(&ids);
                for found in found {
                    // A restore opens what it has restored; nothing else is there yet.
                    if node.is_restoring() && node.parts.groups.get(found.record.group()).is_none()
                    {
                        skipped = true;
                        continue;
                    }
                    let destroying = found.record.is_destroying();
                    let (tenant, fresh) = node.tenants.note(found.record);
                    if fresh && !destroying {
                        let own = node.clone();
                        node.spawn(async move { open_tenant(own, tenant).await });
                    }
                }
            }
            Err(e) => tracing::error!(error = %e, "the directory's tenants cannot be read"),
        }
        tokio::select! {
            changed = changes.changed() => if changed.is_err() { return },
            () = tokio::time::sleep(RETRY), if skipped => {}
        }
    }
}

/// Opens a tenant's group here, trying again while its key or the bucket is away.
async fn open_tenant(node: Arc<Node>, tenant: Arc<Tenant>) {
    let record = tenant.record();
    let id = record.group();
    if !record.placement.contains(&node.config.name) {
        return tenant.set_group(Err("this node holds no replica of the tenant".into()));
    }
    if record.incarnation == 0 {
        let why = record.withheld();
        return tenant.set_group(Err(why.unwrap_or("the tenant is not made yet".into())));
    }
    let mut told = String::new();
    let dir = node.parts.replica_dir(id);
    while !rebuilding::has_ended(&node, &tenant, id) {
        let was_damaged = is_quarantined(&dir);
        match open_group(&node, &tenant).await {
            Ok(group) if tenant.record().group() == id => {
                let sealed = group.sealed();
                tracing::info!(tenant = %record.id, incarnation = record.incarnation, ?sealed, "tenant is open");
                if let (Some(keys), None) = (group.keys(), tenant.record().withheld()) {
                    tenant.key.proven(keys.asked());
                }
                tenant.set_group(Ok(group.clone()));
                let own = node.clone();
                node.spawn(async move { keeper::keep(own, tenant, group).await });
                return drop_older(&node, id).await;
            }
            // Another incarnation began meanwhile, and is being opened.
            Ok(_) => return drop_older(&node, tenant.record().group()).await,
            Err(_) if tenant.record().group() != id => return,
            Err(why) => {
                if !was_damaged && is_quarantined(&dir) {
                    let detail = "a file of it is damaged; it is rebuilt from its peers".into();
                    node.event(&record, EventKind::ReplicaDamaged, detail);
                }
                let why = match rebuilding::rebuild(&node, &tenant).await {
                    Some(Ok(())) => continue,
                    Some(Err(e)) => format!("{why}, and is not rebuilt from its peers yet: {e}"),
                    None => why,
                };
                if why != told {
                    tracing::error!(tenant = %record.id, %why, "tenant cannot be opened; it is tried again");
                    told.clone_from(&why);
                }
                tenant.set_group(Err(why));
                tokio::time::sleep(RETRY).await;
            }
        }
    }
}

/// Removes what is open here of incarnations before `id`: nothing refers to them any more.
async fn drop_older(node: &Node, id: replication::GroupId) {
    for group in node.parts.groups.all() {
        let old = group.id();
        if old.tenant == id.tenant && old.incarnation < id.incarnation {
            node.parts.groups.remove(old);
            group.shutdown().await;
            // Its engine is closed before its files go.
            group.seal("another incarnation took its place").await;
        }
    }
    // Also of those that a crash left and nobody opens.
    for incarnation in 1..id.incarnation {
        let old = replication::GroupId { incarnation, ..id };
        let dir = node.parts.replica_dir(old);
        if dir.exists() {
            node.parts.log.drop_group(old);
            if let Err(e) = std::fs::remove_dir_all(dir) {
                tracing::warn!(group = %old, error = %e, "a replica's directory is not removed");
            }
        }
    }
}

/// The keys of a tenant that is opened, or why it is opened sealed.
async fn keys(parts: &Parts, record: &TenantRecord) -> Result<Arc<TenantKeys>, String> {
    match wrapped(parts, record).await {
        Ok(keys) => Ok(Arc::new(keys)),
        // No time of a refusal or a sealing is noted: that was before this process.
        Err(e) => {
            tracing::error!(tenant = %record.id, error = %e, "ALARM: the tenant is opened sealed");
            Err(reason(&e))
        }
    }
}

async fn open_group(node: &Arc<Node>, tenant: &Tenant) -> Result<Arc<Group>, String> {
    let record = &tenant.record();
    let id = record.group();
    let open = node.parts.groups.get(id);
    let key = node
        .archive_key()
        .ok_or("the region's archive key is not known yet")?;
    let group = match open {
        Some(open) => open,
        None => {
            let parts = &node.parts;
            // Whatever keeps the key away: the group goes on without it.
            let keys = match record.withheld() {
                Some(why) => Err(why),
                None => keys(parts, record).await,
            };
            let opening = Opening {
                id,
                keys,
                rpo: Duration::from_millis(record.rpo_ms),
                archive_key: key,
                report: node.report(),
                min_voters: record.placement.len() / 2 + 1,
                begun: None,
            };
            parts.open(opening).await?
        }
    };
    let first = record.placement.first() == Some(&node.config.name);
    if first && !record.formed && record.incarnation == 1 {
        let directory = node.directory().ok_or("there is no directory")?;
        let nodes = placed(&directory, record)?;
        let members = nodes.into_iter().map(|n| (n.id, n.peer_address)).collect();
        // An error of one that is formed already is none.
        group.initialize(members).await.map_err(|e| e.to_string())?;
    }
    Ok(group)
}

fn placed(directory: &Directory, record: &TenantRecord) -> Result<Vec<NodeRecord>, String> {
    let nodes = directory.nodes().map_err(|e| e.to_string())?;
    let nodes: Vec<NodeRecord> = nodes.into_iter().map(|f| f.record).collect();
    let find = |name: &String| nodes.iter().find(|n| n.name == *name).cloned();
    let placed: Option<Vec<NodeRecord>> = record.placement.iter().map(find).collect();
    placed.ok_or_else(|| "a node of the placement is not registered".into())
}

/// Chooses one node in each of three zones.
pub fn place(directory: &Directory) -> Result<Vec<String>, String> {
    chosen(directory, BTreeMap::new())
}

/// As `place`, with `node` among them.
pub fn place_with(directory: &Directory, node: &NodeRecord) -> Result<Vec<String>, String> {
    let own = BTreeMap::from([(node.zone.clone(), node.name.clone())]);
    chosen(directory, own)
}

fn chosen(
    directory: &Directory,
    mut zones: BTreeMap<String, String>,
) -> Result<Vec<String>, String> {
    let own: Vec<String> = zones.values().cloned().collect();
    let nodes = directory.nodes().map_err(|e| e.to_string())?;
    for node in nodes {
        zones.entry(node.record.zone).or_insert(node.record.name);
    }
    if zones.len() < 3 {
        return Err(format!(
            "the region has nodes in {} zones; a tenant needs three, since two cannot survive the loss of either",
            zones.len()
        ));
    }
    let others = zones.into_values().filter(|name| !own.contains(name));
    Ok(own.iter().cloned().chain(others).take(3).collect())
}

/// Keeps this node's record, and the newest links of the tenants that it leads.
pub async fn keep_records(node: Arc<Node>) {
    let mut pending: HashMap<TenantId, super::records::LinkRecord> = HashMap::new();
    let mut registered = false;
    loop {
        if !registered {
            match node.register().await {
                Ok(()) => registered = true,
                Err(why) => tracing::debug!(%why, "this node is not registered yet"),
            }
        }
        pending.extend(node.take_links().into_iter().map(|l| (l.tenant, l)));
        if let Some(directory) = node.directory()
            && let Ok(known) = directory.links()
        {
            let known: HashMap<_, _> = known.into_iter().map(|f| (f.record.tenant, f)).collect();
            for link in pending.values() {
                let known = known.get(&link.tenant);
                let newer = known.is_none_or(|k| {
                    (k.record.incarnation, k.record.link) < (link.incarnation, link.link)
                });
                if newer
                    && let Err(e) = directory
                        .put_link(link, known.map_or(0, |k| k.modified))
                        .await
                {
                    tracing::debug!(error = %e, "a link is not recorded yet");
                }
            }
            pending.clear();
        }
        tokio::time::sleep(if registered { RECORDS } else { RETRY }).await;
    }
}

/// Makes the members of the groups that this node leads be those that the directory wants: a node
/// that came back under its name with a new id takes the place of its predecessor.
pub async fn keep_members(node: Arc<Node>) {
    loop {
        tokio::time::sleep(MEMBERS).await;
        let Some(directory) = node.directory() else {
            continue;
        };
        let Ok(nodes) = directory.nodes() else {
            continue;
        };
        let nodes: Vec<NodeRecord> = nodes.into_iter().map(|f| f.record).collect();
        if directory.group().is_leader() && !node.joins.directory_waits() {
            reconcile(&node, directory.group(), &nodes).await;
        }
        for tenant in node.tenants.all() {
            let record = tenant.record();
            if let Ok(group) = tenant.group()
                && group.is_leader()
                && !node.joins.tenant_waits(record.tier, record.id)
            {
                let placed: Vec<NodeRecord> = nodes
                    .iter()
                    .filter(|n| record.placement.contains(&n.name))
                    .cloned()
                    .collect();
                reconcile(&node, &group, &placed).await;
            }
        }
    }
}

async fn reconcile(node: &Node, group: &Group, wanted: &[NodeRecord]) {
    let status = group.status();
    let mut members: BTreeMap<u64, String> = BTreeMap::new();
    for n in wanted {
        if status.voters.contains(&n.id) || node.is_connected(n) {
            members.insert(n.id, n.peer_address.clone());
        }
    }
    let same = members.len() == status.voters.len()
        && status.voters.iter().all(|v| members.contains_key(v));
    // Never fewer than before: a replaced member goes when the one in its place is there.
    if same || members.len() < status.voters.len() || !members.contains_key(&node.id) {
        return;
    }
    tracing::info!(group = %group.id(), from = ?status.voters, to = ?members.keys(), "changing the members");
    let change = tokio::time::timeout(Duration::from_secs(60), group.set_members(members)).await;
    match change {
        Ok(Ok(())) => {}
        Ok(Err(e)) => {
            tracing::warn!(group = %group.id(), error = %e, "the members are not changed yet")
        }
        Err(_) => {
            tracing::warn!(group = %group.id(), "the members are not changed within a minute")
        }
    }
}

/// Scans the replicas of this node, one after the other, and quarantines one whose rows do not have
/// its digest, as long as all other nodes of its placement hold a replica: one fault of ours in all
/// of them must not take the tenant away.
pub async fn scan_replicas(node: Arc<Node>) {
    let every = node.config.scan_every_s.map(Duration::from_secs);
    let every = every.unwrap_or(limits::SCAN_EVERY);
    loop {
        // Not all nodes at once.
        let some = rand::random_range(0.0..0.25);
        tokio::time::sleep(every + every.mul_f64(some)).await;
        for tenant in node.tenants.all() {
            let Ok(group) = tenant.group() else { continue };
            if group.sealed().is_some() {
                continue;
            }
            let scanned = group.clone();
            let scan = tokio::task::spawn_blocking(move || scanned.scan(limits::SCAN_RATE));
            let Ok(Err(e)) = scan.await else { continue };
            if matches!(e, ScanError::Engine(EngineError::Sealed)) {
                continue;
            }
            tracing::error!(group = %group.id(), error = %e, "ALARM: a scan found this replica damaged");
            crate::server::metrics::DIGEST_DIFFERENCES.inc();
            // Said before the others are asked: of two that do this at once neither goes on.
            group.set_quarantined(true);
            match e.is_damage() && others_hold(&node, &tenant.record()).await {
                true => {
                    let detail = format!("{e}; it is rebuilt from its peers");
                    node.event(&tenant.record(), EventKind::ReplicaDamaged, detail);
                    if !group.quarantine().await {
                        continue;
                    }
                    rebuilding::let_go(&node, &tenant, &group).await;
                    if tenant.record().group() == group.id() {
                        let own = node.clone();
                        node.spawn(async move { open_tenant(own, tenant).await });
                    }
                }
                false => group.set_quarantined(false),
            }
        }
    }
}

async fn others_hold(node: &Node, record: &TenantRecord) -> bool {
    let Some(nodes) = node.directory().and_then(|d| placed(&d, record).ok()) else {
        return false;
    };
    for other in nodes.iter().filter(|n| n.id != node.id) {
        if node.holds(other, record.group()).await != Some(true) {
            return false;
        }
    }
    true
}

/// Compares the digests of the groups led here with those of the other replicas at the same
/// positions. A difference is an alarm: one of them is wrong.
pub async fn compare_digests(node: Arc<Node>) {
    loop {
        tokio::time::sleep(DIGESTS).await;
        let Some(directory) = node.directory() else {
            continue;
        };
        let Ok(nodes) = directory.nodes() else {
            continue;
        };
        for tenant in node.tenants.all() {
            let Ok(group) = tenant.group() else { continue };
            if !group.is_leader() {
                continue;
            }
            let own: HashMap<u64, _> = group.recent_digests().into_iter().collect();
            for found in nodes.iter().filter(|n| n.record.id != node.id) {
                let Some(theirs) = node.digests_of(&found.record, group.id()).await else {
                    continue;
                };
                let differs = theirs
                    .iter()
                    .find(|(index, d)| own.get(index).is_some_and(|o| o != d));
                if let Some((index, _)) = differs {
                    tracing::error!(group = %group.id(), node = %found.record.name, index, "ALARM: a replica's digest differs");
                    crate::server::metrics::DIGEST_DIFFERENCES.inc();
                }
            }
        }
    }
}
