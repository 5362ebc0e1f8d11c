//! Keys of the column families.
//!
//! `rev`: revision (8, BE) | sub (4, BE).
//! `hist`: escaped user key | revision, complemented (8, BE): of one key the newest comes first,
//! and user keys keep their order. Escaping: 00 → 00 FF, terminated by 00 01.

use std::ops::Bound;

use bytes::Bytes;

pub fn rev(revision: i64, sub: u32) -> [u8; 12] {
    let mut key = [0u8; 12];
    key[..8].copy_from_slice(&revision.to_be_bytes());
    key[8..].copy_from_slice(&sub.to_be_bytes());
    key
}

pub fn escape(user_key: &[u8]) -> Vec<u8> {
    let mut out = Vec::with_capacity(user_key.len() + 10);
    for byte in user_key {
        out.push(*byte);
        if *byte == 0 {
            out.push(0xff);
        }
    }
    out.extend_from_slice(&[0, 1]);
    out
}

pub fn hist(user_key: &[u8], revision: i64) -> Vec<u8> {
    let mut out = escape(user_key);
    out.extend_from_slice(&(!revision as u64).to_be_bytes());
    out
}

/// The user key and revision of a `hist` key.
pub fn parse_hist(key: &[u8]) -> Option<(Bytes, i64)> {
    let (escaped, revision) = key.split_last_chunk::<8>()?;
    let mut user_key = Vec::with_capacity(escaped.len());
    let mut bytes = escaped.iter();
    loop {
        match *bytes.next()? {
            0 => match *bytes.next()? {
                0xff => user_key.push(0),
                1 if bytes.next().is_none() => break,
                _ => return None,
            },
            byte => user_key.push(byte),
        }
    }
    Some((user_key.into(), !u64::from_be_bytes(*revision) as i64))
}

/// A range of user keys as a request names it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum KeyRange {
    One(Bytes),
    /// From the first key, inclusive, to the end, exclusive; `None` is no end.
    Many(Bytes, Option<Bytes>),
}

impl KeyRange {
    /// etcd's rule: no end is one key, end `\0` is everything from `key` on.
    pub fn new(key: &Bytes, range_end: &Bytes) -> KeyRange {
        match range_end.as_ref() {
            [] => KeyRange::One(key.clone()),
            [0] => KeyRange::Many(key.clone(), None),
            _ => KeyRange::Many(key.clone(), Some(range_end.clone())),
        }
    }

    pub fn is_empty(&self) -> bool {
        matches!(self, KeyRange::Many(from, Some(to)) if to <= from)
    }

    pub fn contains(&self, key: &[u8]) -> bool {
        match self {
            KeyRange::One(one) => one == key,
            KeyRange::Many(from, to) => {
                key >= from.as_ref() && to.as_ref().is_none_or(|to| key < to.as_ref())
            }
        }
    }

    /// Bounds for an ordered map; the caller has checked `is_empty`.
    pub fn bounds(&self) -> (Bound<Bytes>, Bound<Bytes>) {
        match self {
            KeyRange::One(one) => (Bound::Included(one.clone()), Bound::Included(one.clone())),
            KeyRange::Many(from, to) => (
                Bound::Included(from.clone()),
                to.clone().map_or(Bound::Unbounded, Bound::Excluded),
            ),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn history_sorts_by_user_key_then_newest_first() {
        let keys: [&[u8]; 6] = [b"", b"\0", b"\0\0", b"a", b"a\0", b"ab"];
        let mut rows: Vec<Vec<u8>> = Vec::new();
        for k in keys {
            for r in [9, 3, 1] {
                rows.push(hist(k, r));
                assert_eq!(
                    parse_hist(&hist(k, r)).unwrap(),
                    (Bytes::copy_from_slice(k), r)
                );
            }
        }
        let mut sorted = rows.clone();
        sorted.sort();
        assert_eq!(rows, sorted);
    }

    #[test]
    fn ranges() {
        let b = Bytes::from_static;
        assert!(KeyRange::new(&b(b"b"), &b(b"a")).is_empty());
        assert!(KeyRange::new(&b(b"b"), &b(b"\0")).contains(b"zzz"));
        assert!(!KeyRange::new(&b(b"b"), &b(b"")).contains(b"bb"));
    }
}
