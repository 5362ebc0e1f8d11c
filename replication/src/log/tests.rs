//! The log after a crash, a torn write, and damage.

use std::path::Path;
use std::sync::Arc;

use kms::TenantId;
use openraft::storage::{IOFlushed, RaftLogStorage};
use openraft::{EntryPayload, RaftLogReader};

use super::{LogError, NodeLog};
use crate::group::types::{Entry, Sealed, TypeConfig, Vote, log_id};
use crate::{GroupId, Position};

fn group(n: u8) -> GroupId {
    GroupId {
        tenant: TenantId([n; 16]),
        incarnation: 1,
    }
}

fn entry(term: u64, index: u64) -> Entry {
    Entry {
        log_id: log_id(Position {
            term,
            node: 1,
            index,
        }),
        payload: EntryPayload::Normal(Sealed(vec![index as u8; 40].into())),
    }
}

async fn append(log: &Arc<NodeLog>, group: GroupId, entries: Vec<Entry>) {
    let (tx, rx) = <TypeConfig as openraft::type_config::TypeConfigExt>::oneshot();
    log.group(group)
        .append(entries, IOFlushed::signal(tx))
        .await
        .unwrap();
    rx.await.unwrap().unwrap();
}

/// Everything that a restart must find again.
async fn contents(log: &Arc<NodeLog>) -> Vec<(Option<Vote>, Vec<Entry>)> {
    let mut all = Vec::new();
    for n in [1, 2] {
        let mut reader = log.group(group(n)).reader();
        all.push((
            reader.read_vote().await.unwrap(),
            reader.try_get_log_entries(..).await.unwrap(),
        ));
    }
    all
}

/// A log of two groups whose thread has marked itself idle.
async fn filled(dir: &Path) -> Vec<(Option<Vote>, Vec<Entry>)> {
    let log = NodeLog::open(dir).unwrap();
    for index in 1..6 {
        append(&log, group(1), vec![entry(1, index)]).await;
        append(&log, group(2), vec![entry(1, index)]).await;
    }
    log.group(group(1))
        .save_vote(&Vote::new_committed(2, 1))
        .await
        .unwrap();
    append(&log, group(1), vec![entry(2, 6)]).await;
    tokio::time::sleep(std::time::Duration::from_millis(200)).await;
    let all = contents(&log).await;
    drop(log);
    tokio::time::sleep(std::time::Duration::from_millis(100)).await;
    all
}

fn the_file(dir: &Path) -> std::path::PathBuf {
    dir.join("0000000001.log")
}

#[tokio::test(flavor = "multi_thread")]
async fn what_was_synced_is_there_after_a_restart() {
    let dir = tempfile::tempdir().unwrap();
    let before = filled(dir.path()).await;
    let log = NodeLog::open(dir.path()).unwrap();
    assert_eq!(contents(&log).await, before);
    // And what is appended then, in a segment of its own, is there after the next.
    append(&log, group(2), vec![entry(3, 6)]).await;
    let before = contents(&log).await;
    drop(log);
    let log = NodeLog::open(dir.path()).unwrap();
    assert_eq!(contents(&log).await, before);
}

/// Row 13 of the fault catalogue: no flip changes what is read without being noticed.
#[tokio::test(flavor = "multi_thread")]
async fn a_flip_at_every_byte_is_noticed_or_harmless() {
    let dir = tempfile::tempdir().unwrap();
    let before = filled(dir.path()).await;
    let good = std::fs::read(the_file(dir.path())).unwrap();
    let end = good.len() - good.iter().rev().take_while(|b| **b == 0).count();
    let (mut refused, mut harmless) = (0, 0);
    for at in 0..end + 64 {
        let copy = tempfile::tempdir().unwrap();
        let mut bad = good[..(end + 128).min(good.len())].to_vec();
        bad[at] ^= 1 << (at % 8);
        std::fs::write(the_file(copy.path()), &bad).unwrap();
        match NodeLog::open(copy.path()) {
            Err(LogError::Damaged { .. } | LogError::Format { .. }) => refused += 1,
            Err(e) => panic!("flip at {at}: {e}"),
            Ok(log) => {
                assert_eq!(
                    contents(&log).await,
                    before,
                    "flip at {at} of {end} changed what is read"
                );
                harmless += 1;
            }
        }
    }
    // All but the idle mark, which holds nothing, and the empty space behind it.
    assert!(
        refused > end * 9 / 10,
        "{refused} refused, {harmless} harmless of {end}"
    );
}

/// Row 14: a record cut at every byte is discarded, and nothing before it.
#[tokio::test(flavor = "multi_thread")]
async fn a_tail_torn_at_every_byte_loses_only_itself() {
    let dir = tempfile::tempdir().unwrap();
    let log = NodeLog::open(dir.path()).unwrap();
    for index in 1..4 {
        append(&log, group(1), vec![entry(1, index)]).await;
    }
    let before = contents(&log).await;
    let used = |bytes: &[u8]| bytes.len() - bytes.iter().rev().take_while(|b| **b == 0).count();
    let start = used(&std::fs::read(the_file(dir.path())).unwrap());
    append(&log, group(1), vec![entry(1, 4)]).await;
    let bytes = std::fs::read(the_file(dir.path())).unwrap();
    let end = used(&bytes);
    assert!(end > start + 40);
    for cut in start + 8..end {
        let copy = tempfile::tempdir().unwrap();
        std::fs::write(the_file(copy.path()), &bytes[..cut]).unwrap();
        let log = NodeLog::open(copy.path()).unwrap();
        assert_eq!(contents(&log).await, before, "cut at {cut}");
        append(&log, group(1), vec![entry(2, 4)]).await;
        drop(log);
        let log = NodeLog::open(copy.path()).unwrap();
        assert_eq!(contents(&log).await[0].1.len(), 4, "after a cut at {cut}");
    }
}

/// Row 38.
#[tokio::test(flavor = "multi_thread")]
async fn a_newer_format_is_refused() {
    let dir = tempfile::tempdir().unwrap();
    filled(dir.path()).await;
    let mut bytes = std::fs::read(the_file(dir.path())).unwrap();
    bytes[4] = 2;
    let crc = crc32fast::hash(&bytes[..24]);
    bytes[24..28].copy_from_slice(&crc.to_be_bytes());
    std::fs::write(the_file(dir.path()), &bytes).unwrap();
    assert!(matches!(
        NodeLog::open(dir.path()),
        Err(LogError::Format { format: 2, .. })
    ));
}
