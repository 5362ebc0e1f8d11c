//! Reading a tenant's state, at the newest revision or an older one, together with what the batch
//! being applied has changed so far.

use std::collections::{BTreeMap, HashMap};

use bytes::Bytes;
use rocksdb::{DBRawIterator, ReadOptions, Snapshot};

use super::key::{self, KeyRange};
use super::record::{DELETE, Event, Record};
use crate::engine::{Cf, Engine, EngineError};

/// Changes of a batch that are not in the engine yet, in revision order.
#[derive(Default)]
pub struct Overlay {
    events: Vec<(i64, Bytes, Option<Record>)>,
    latest: HashMap<Bytes, usize>,
}

impl Overlay {
    pub fn push(&mut self, revision: i64, key: Bytes, record: Option<Record>) {
        self.latest.insert(key.clone(), self.events.len());
        self.events.push((revision, key, record));
    }
}

/// A consistent view. `revision` is the newest revision that the engine's part holds.
pub struct View<'a> {
    pub engine: &'a Engine,
    /// Reads are of this snapshot; `None` is the engine's present, for its only writer.
    pub snapshot: Option<Snapshot<'a>>,
    pub revision: i64,
    pub overlay: Option<&'a Overlay>,
}

/// Rows found in a range: the first `limit`, and how many there are.
pub struct Found {
    pub rows: Vec<(Bytes, Record)>,
    pub count: i64,
}

fn damaged() -> EngineError {
    EngineError::Damaged("record")
}

impl View<'_> {
    fn options(&self) -> ReadOptions {
        let mut options = ReadOptions::default();
        if let Some(snapshot) = &self.snapshot {
            options.set_snapshot(snapshot);
        }
        options
    }

    /// The live record of `key`.
    pub fn get(&self, key: &[u8]) -> Result<Option<Record>, EngineError> {
        if let Some(overlay) = self.overlay
            && let Some(at) = overlay.latest.get(key)
        {
            return Ok(overlay.events[*at].2.clone());
        }
        let cf = self.engine.cf(Cf::Kv);
        let row = match &self.snapshot {
            None => self.engine.db().get_pinned_cf(cf, key)?,
            Some(_) => self
                .engine
                .db()
                .get_pinned_cf_opt(cf, key, &self.options())?,
        };
        row.map(|row| Record::decode(&row).ok_or_else(damaged))
            .transpose()
    }

    /// Live records of `range` at `revision` (which the caller has checked); `limit` 0 is none.
    pub fn scan(
        &self,
        range: &KeyRange,
        revision: i64,
        limit: usize,
    ) -> Result<Found, EngineError> {
        if range.is_empty() {
            return Ok(Found {
                rows: Vec::new(),
                count: 0,
            });
        }
        let pending: &[(i64, Bytes, Option<Record>)] = match self.overlay {
            Some(overlay) => &overlay.events,
            None => &[],
        };
        let pending = pending
            .iter()
            .filter(|(at, key, _)| *at <= revision && range.contains(key));
        let mut pending = pending.peekable();
        let limit = if limit == 0 { usize::MAX } else { limit };
        if pending.peek().is_none() {
            return self.scan_engine(range, revision, limit);
        }
        let found = self.scan_engine(range, revision, usize::MAX)?;
        let mut rows: BTreeMap<Bytes, Record> = found.rows.into_iter().collect();
        for (_, key, record) in pending {
            match record {
                Some(record) => rows.insert(key.clone(), record.clone()),
                None => rows.remove(key),
            };
        }
        let count = rows.len() as i64;
        Ok(Found {
            rows: rows.into_iter().take(limit).collect(),
            count,
        })
    }

    fn scan_engine(
        &self,
        range: &KeyRange,
        revision: i64,
        limit: usize,
    ) -> Result<Found, EngineError> {
        if revision < self.revision {
            return self.scan_history(range, revision, limit);
        }
        let (from, to) = match range {
            KeyRange::One(key) => {
                let rows: Vec<_> = match self.engine_get(key)? {
                    Some(record) => vec![(key.clone(), record)],
                    None => vec![],
                };
                let count = rows.len() as i64;
                return Ok(Found { rows, count });
            }
            KeyRange::Many(from, to) => (from, to),
        };
        let mut options = self.options();
        if let Some(to) = to {
            options.set_iterate_upper_bound(to.as_ref());
        }
        let mut rows = self
            .engine
            .db()
            .raw_iterator_cf_opt(self.engine.cf(Cf::Kv), options);
        rows.seek(from);
        let mut found = Found {
            rows: Vec::new(),
            count: 0,
        };
        while let Some((key, row)) = rows.item() {
            found.count += 1;
            if found.rows.len() < limit {
                let record = Record::decode(row).ok_or_else(damaged)?;
                found.rows.push((Bytes::copy_from_slice(key), record));
            }
            rows.next();
        }
        rows.status()?;
        Ok(found)
    }

    fn engine_get(&self, key: &[u8]) -> Result<Option<Record>, EngineError> {
        let row =
            self.engine
                .db()
                .get_pinned_cf_opt(self.engine.cf(Cf::Kv), key, &self.options())?;
        row.map(|row| Record::decode(&row).ok_or_else(damaged))
            .transpose()
    }

    /// As `scan_engine` below the newest revision: for each user key in `hist`, the newest row at
    /// or before `revision`.
    fn scan_history(
        &self,
        range: &KeyRange,
        revision: i64,
        limit: usize,
    ) -> Result<Found, EngineError> {
        let (from, to) = match range {
            KeyRange::One(key) => {
                let mut end = key.to_vec();
                end.push(0);
                (key.clone(), Some(key::escape(&end)))
            }
            KeyRange::Many(from, to) => (from.clone(), to.as_ref().map(|to| key::escape(to))),
        };
        let mut options = self.options();
        if let Some(to) = to {
            options.set_iterate_upper_bound(to);
        }
        let mut rows = self
            .engine
            .db()
            .raw_iterator_cf_opt(self.engine.cf(Cf::Hist), options);
        rows.seek(key::escape(&from));
        let mut found = Found {
            rows: Vec::new(),
            count: 0,
        };
        while let Some((user_key, newest)) = Self::history_row(&rows)? {
            if newest > revision {
                rows.seek(key::hist(&user_key, revision));
            }
            let row = rows
                .item()
                .and_then(|(k, v)| Some((key::parse_hist(k)?, v.to_vec())));
            if let Some(((at_key, at), row)) = row
                && at_key == user_key
                && row.first() != Some(&DELETE)
            {
                found.count += 1;
                if found.rows.len() < limit {
                    found
                        .rows
                        .push((user_key.clone(), self.event_record(at, &row)?));
                }
            }
            // Past this key's oldest row, whose complemented revision is below all ones.
            let mut next = key::escape(&user_key);
            next.extend_from_slice(&[0xff; 9]);
            rows.seek(next);
        }
        rows.status()?;
        Ok(found)
    }

    fn history_row(rows: &DBRawIterator<'_>) -> Result<Option<(Bytes, i64)>, EngineError> {
        let Some(row) = rows.key() else {
            return Ok(None);
        };
        key::parse_hist(row)
            .map(Some)
            .ok_or(EngineError::Damaged("history key"))
    }

    fn event_record(&self, revision: i64, history: &[u8]) -> Result<Record, EngineError> {
        let bad = || EngineError::Damaged("history row");
        let sub = history
            .get(1..5)
            .and_then(|b| b.try_into().ok())
            .ok_or_else(bad)?;
        let row = self
            .engine
            .get(Cf::Rev, &key::rev(revision, u32::from_be_bytes(sub)))?
            .ok_or_else(bad)?;
        Event::decode(&row).and_then(|e| e.record).ok_or_else(bad)
    }
}
