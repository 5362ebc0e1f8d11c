//! Reading the log's files when a node starts.

use std::collections::HashMap;
use std::fs::{File, OpenOptions};
use std::path::Path;
use std::sync::Arc;

use parking_lot::Mutex;

use super::frame::{self, Unreadable};
use super::index::{Index, Place};
use super::record::{self, Record};
use super::segment::{Segment, Segments};
use super::{LogError, segment_path};
use crate::GroupId;

pub struct Recovered {
    pub groups: HashMap<GroupId, Arc<Mutex<Index>>>,
    pub segments: Segments,
    pub next_sequence: u64,
}

fn io(path: &Path) -> impl Fn(std::io::Error) -> LogError + '_ {
    move |cause| LogError::Io {
        path: path.display().to_string(),
        cause,
    }
}

fn segment_numbers(dir: &Path) -> Result<Vec<u64>, LogError> {
    let mut numbers = Vec::new();
    for entry in std::fs::read_dir(dir).map_err(io(dir))? {
        let name = entry.map_err(io(dir))?.file_name();
        let number: Option<u64> = name
            .to_str()
            .and_then(|n| n.strip_suffix(".log"))
            .and_then(|n| n.parse().ok());
        numbers.extend(number);
    }
    numbers.sort_unstable();
    Ok(numbers)
}

/// Repeats every record of every segment. A torn tail of the last segment is cut off.
pub fn recover(dir: &Path) -> Result<Recovered, LogError> {
    let numbers = segment_numbers(dir)?;
    let mut groups: HashMap<GroupId, Index> = HashMap::new();
    let mut segments = Segments::default();
    let mut sequence = 0;
    for (n, number) in numbers.iter().enumerate() {
        if n > 0 && *number != numbers[n - 1] + 1 {
            let missing = segment_path(dir, numbers[n - 1] + 1);
            return Err(LogError::Missing(missing.display().to_string()));
        }
        let path = segment_path(dir, *number);
        let bytes = std::fs::read(&path).map_err(io(&path))?;
        let file = OpenOptions::new()
            .read(true)
            .write(true)
            .open(&path)
            .map_err(io(&path))?;
        segments.all.insert(
            *number,
            Segment {
                file: Arc::new(file),
                path: path.clone(),
                bytes: bytes.len() as u64,
                live: 0,
                live_bytes: 0,
            },
        );
        let last = n + 1 == numbers.len();
        let end = replay(
            &path,
            *number,
            &bytes,
            &mut sequence,
            &mut groups,
            &mut segments,
            last,
        )?;
        if last {
            cut(&path, &bytes, end)?;
            if let Some(segment) = segments.all.get_mut(number) {
                segment.bytes = end as u64;
            }
        }
    }
    if let Some((group, _)) = groups.iter().find(|(_, index)| !index.is_whole()) {
        return Err(LogError::Gap(*group));
    }
    Ok(Recovered {
        groups: groups
            .into_iter()
            .map(|(g, i)| (g, Arc::new(Mutex::new(i))))
            .collect(),
        segments,
        next_sequence: sequence + 1,
    })
}

/// Repeats one segment; answers where its valid part ends.
fn replay(
    path: &Path,
    number: u64,
    bytes: &[u8],
    sequence: &mut u64,
    groups: &mut HashMap<GroupId, Index>,
    segments: &mut Segments,
    last: bool,
) -> Result<usize, LogError> {
    let damaged = |offset: usize| LogError::Damaged {
        file: path.display().to_string(),
        offset: offset as u64,
    };
    let mut at = 0;
    while at < bytes.len() {
        let frame = match frame::parse(&bytes[at..]) {
            Ok(frame) => frame,
            Err(Unreadable::Format(format)) => {
                return Err(LogError::Format {
                    file: path.display().to_string(),
                    format,
                });
            }
            Err(Unreadable::Invalid) => {
                let rest = &bytes[at..];
                let clean = rest.iter().all(|b| *b == 0);
                if !clean && (!last || frame::any_valid_after(rest, *sequence)) {
                    return Err(damaged(at));
                }
                if clean && !last && at == 0 {
                    return Err(damaged(0));
                }
                return Ok(at);
            }
        };
        // A frame that repeats or skips a sequence was put there by nothing that writes here.
        if *sequence != 0 && frame.sequence != *sequence + 1 {
            return Err(damaged(at));
        }
        *sequence = frame.sequence;
        let body = at + frame::HEADER;
        let records = record::decode(frame.body).ok_or_else(|| damaged(at))?;
        for (group, record, offset) in records {
            let length = match &record {
                Record::Append(entry) | Record::Moved(entry) => entry.len(),
                _ => 0,
            };
            let place = Place {
                segment: number,
                offset: (body + offset) as u64,
                length: length as u32,
            };
            if length > 0 {
                segments.hold(place);
            }
            let dropped = record == Record::Drop;
            let freed = groups
                .entry(group)
                .or_default()
                .replay(&record, place)
                .ok_or_else(|| damaged(at))?;
            segments.free(&freed);
            if dropped {
                groups.remove(&group);
            }
        }
        at = body + frame.body.len();
    }
    Ok(at)
}

/// Cuts a torn tail off and syncs, so that its bytes cannot be taken for anything later.
fn cut(path: &Path, bytes: &[u8], end: usize) -> Result<(), LogError> {
    if bytes[end..].iter().any(|b| *b != 0) {
        tracing::warn!(
            bytes = bytes.len() - end,
            "the log's torn tail is discarded; it was never acknowledged"
        );
    }
    let file = File::options().write(true).open(path).map_err(io(path))?;
    file.set_len(end as u64).map_err(io(path))?;
    file.sync_all().map_err(io(path))
}
