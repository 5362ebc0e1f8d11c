//! The log after a crash, a torn write, and damage.

use std::path::Path;
use std::sync::Arc;

use kms::TenantId;
use openraft::storage::{IOFlushed, RaftLogStorage};
use openraft::{EntryPayload, RaftLogReader};
use rand::{Rng, SeedableRng};

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

/// Copies of the log's files as the log's thread left them after a frame.
fn image(dir: &Path) -> tempfile::TempDir {
    let copy = tempfile::tempdir().unwrap();
    for file in std::fs::read_dir(dir).unwrap() {
        let file = file.unwrap();
        std::fs::copy(file.path(), copy.path().join(file.file_name())).unwrap();
    }
    copy
}

/// Where each frame of the newest file begins.
fn frames(dir: &Path) -> (std::path::PathBuf, Vec<u64>) {
    let mut files: Vec<_> = std::fs::read_dir(dir).unwrap().collect();
    files.sort_by_key(|f| f.as_ref().unwrap().file_name());
    let newest = files.pop().unwrap().unwrap().path();
    let bytes = std::fs::read(&newest).unwrap();
    let (mut at, mut starts) = (0, Vec::new());
    while let Ok(frame) = super::frame::parse(&bytes[at..]) {
        starts.push(at as u64);
        at += super::frame::HEADER + frame.body.len();
    }
    (newest, starts)
}

/// Segments of a few entries, so that they are begun, emptied and removed all the time: a crash
/// after any frame leaves every acknowledged entry, and no gap.
#[tokio::test(flavor = "multi_thread")]
async fn a_crash_after_any_frame_leaves_every_acknowledged_entry() {
    let mut random = rand::rngs::StdRng::seed_from_u64(7);
    let dir = tempfile::tempdir().unwrap();
    let log = NodeLog::open_with(dir.path(), 1200).unwrap();
    let mut purged = [0u64; 3];
    let mut held: [Vec<(u64, u64)>; 3] = Default::default();
    let mut votes = [0u64; 3];
    let mut cuts = 0;
    for round in 0..600u64 {
        let n = random.random_range(0..3);
        let mut storage = log.group(group(n as u8));
        match random.random_range(0..10) {
            0 => {
                votes[n] = round + 1;
                let vote = Vote::new(round + 1, 1);
                storage.save_vote(&vote).await.unwrap();
            }
            1..3 if held[n].len() > 2 => {
                let keep = random.random_range(1..held[n].len());
                let (term, index) = held[n][keep - 1];
                held[n].truncate(keep);
                let at = entry(term, index).log_id;
                storage.truncate_after(Some(at)).await.unwrap();
            }
            3..6 if held[n].len() > 4 => {
                let upto = random.random_range(0..held[n].len() - 1);
                let (term, index) = held[n][upto];
                purged[n] = index;
                held[n].drain(..=upto);
                storage.purge(entry(term, index).log_id).await.unwrap();
            }
            _ => {}
        }
        let last = held[n].last().map_or(purged[n], |at| at.1);
        let count = random.random_range(1..4);
        let list: Vec<Entry> = (1..=count).map(|i| entry(round + 1, last + i)).collect();
        held[n].extend((1..=count).map(|i| (round + 1, last + i)));
        let (tell, told) = tokio::sync::oneshot::channel();
        let path = dir.path().to_path_buf();
        // On the log's thread, which writes nothing meanwhile.
        let done = Box::new(move || drop(tell.send(image(&path))));
        let index = log.groups.lock()[&group(n as u8)].clone();
        log.append(group(n as u8), &index, list.into_iter(), done);
        let copy = told.await.unwrap();
        for cut in frames(copy.path()).1.into_iter().skip(1) {
            let copy = image(copy.path());
            let (newest, _) = frames(copy.path());
            std::fs::File::options()
                .write(true)
                .open(newest)
                .unwrap()
                .set_len(cut)
                .unwrap();
            NodeLog::open(copy.path()).unwrap();
            cuts += 1;
        }
        let reopened = NodeLog::open(copy.path()).unwrap();
        for n in 0..3 {
            let mut reader = reopened.group(group(n as u8)).reader();
            let entries = reader.try_get_log_entries(purged[n] + 1..).await.unwrap();
            let found: Vec<_> = entries
                .iter()
                .map(|e| (e.log_id.leader_id.term, e.log_id.index))
                .collect();
            assert_eq!(found, held[n], "group {n} in round {round}");
            let vote = reader.read_vote().await.unwrap();
            assert_eq!(vote.map_or(0, |v| v.leader_id.term), votes[n]);
        }
    }
    let removed = !dir.path().join("0000000001.log").exists();
    assert!(removed && cuts > 600, "{cuts} cuts");
}
