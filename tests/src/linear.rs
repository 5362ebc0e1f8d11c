//! A linearizability check of recorded histories of one register (Wing and Gong, with memoised
//! states): some order of the operations, each within its call and return, explains every answer.

use std::collections::HashSet;

/// What was asked, and what was answered.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Operation {
    Put(u64),
    Delete,
    /// Set to the second if it holds the first; and whether it did.
    Swap(Option<u64>, u64, Option<bool>),
    /// The answer; nothing is known of a read that failed.
    Read(Option<u64>),
}

/// One operation. `end` is `None` where the outcome is unknown: it may happen at any later time,
/// or never.
#[derive(Clone, Debug)]
pub struct Call {
    pub start: u64,
    pub end: Option<u64>,
    pub operation: Operation,
}

/// The value after `operation`, if its answer fits.
fn step(value: Option<u64>, operation: &Operation) -> Option<Option<u64>> {
    match operation {
        Operation::Put(new) => Some(Some(*new)),
        Operation::Delete => Some(None),
        Operation::Swap(expected, new, answer) => {
            let holds = value == *expected;
            match answer {
                Some(said) if *said != holds => None,
                _ => Some(if holds { Some(*new) } else { value }),
            }
        }
        Operation::Read(seen) => (value == *seen).then_some(value),
    }
}

/// Where a search stands: known calls before `first` are done, and those in `beyond`.
#[derive(Clone, PartialEq, Eq, Hash)]
struct Point {
    first: usize,
    beyond: Vec<usize>,
    /// Calls of unknown outcome that have happened, a bit each.
    unknown: u128,
    value: Option<u64>,
}

/// Whether the history of one key, empty at first, is linearizable. Values are written once.
///
/// # Panics
/// With more than 128 calls of unknown outcome.
pub fn check(history: &[Call]) -> bool {
    // A call of unknown outcome whose value nobody saw need not have happened: most histories are
    // explained without those, and the search is much shorter.
    let seen: HashSet<u64> = history
        .iter()
        .filter_map(|c| match c.operation {
            Operation::Read(value) => value,
            Operation::Swap(expected, _, _) => expected,
            _ => None,
        })
        .collect();
    let needed = |c: &&Call| match c.operation {
        Operation::Put(value) | Operation::Swap(_, value, _) => {
            c.end.is_some() || seen.contains(&value)
        }
        _ => true,
    };
    let short: Vec<Call> = history.iter().filter(needed).cloned().collect();
    search(&short) || (short.len() < history.len() && search(history))
}

fn search(history: &[Call]) -> bool {
    let mut known: Vec<&Call> = history.iter().filter(|c| c.end.is_some()).collect();
    known.sort_by_key(|c| c.start);
    let unknown: Vec<&Call> = history.iter().filter(|c| c.end.is_none()).collect();
    assert!(
        unknown.len() <= 128,
        "{} calls of unknown outcome",
        unknown.len()
    );
    let begin = Point {
        first: 0,
        beyond: Vec::new(),
        unknown: 0,
        value: None,
    };
    let mut seen = HashSet::from([begin.clone()]);
    let mut open = vec![begin];
    while let Some(at) = open.pop() {
        if at.first == known.len() {
            return true;
        }
        // Whatever comes next began before the first of the others ended.
        let mut limit = u64::MAX;
        let mut candidates = Vec::new();
        for (n, call) in known.iter().enumerate().skip(at.first) {
            if call.start > limit {
                break;
            }
            if !at.beyond.contains(&n) {
                limit = limit.min(call.end.unwrap_or(u64::MAX));
                candidates.push(n);
            }
        }
        // Explored last in, first out: what nobody may have seen comes last.
        for (n, call) in unknown.iter().enumerate() {
            if at.unknown & (1 << n) == 0
                && call.start <= limit
                && let Some(value) = step(at.value, &call.operation)
            {
                let next = Point {
                    unknown: at.unknown | (1 << n),
                    value,
                    ..at.clone()
                };
                if seen.insert(next.clone()) {
                    open.push(next);
                }
            }
        }
        for n in candidates.into_iter().rev() {
            let call = known[n];
            if call.start > limit {
                continue;
            }
            let Some(value) = step(at.value, &call.operation) else {
                continue;
            };
            let mut next = Point {
                value,
                ..at.clone()
            };
            next.beyond.push(n);
            next.beyond.sort_unstable();
            while next.beyond.first() == Some(&next.first) {
                next.beyond.remove(0);
                next.first += 1;
            }
            if seen.insert(next.clone()) {
                open.push(next);
            }
        }
    }
    false
}

#[cfg(test)]
mod tests {
    use super::*;

    fn call(start: u64, end: u64, operation: Operation) -> Call {
        Call {
            start,
            end: Some(end),
            operation,
        }
    }

    #[test]
    fn a_stale_read_is_found() {
        let stale = [
            call(0, 1, Operation::Put(1)),
            call(2, 3, Operation::Put(2)),
            call(4, 5, Operation::Read(Some(1))),
        ];
        assert!(!check(&stale));
        let overlapping = [
            call(0, 1, Operation::Put(1)),
            call(2, 5, Operation::Put(2)),
            call(3, 4, Operation::Read(Some(1))),
        ];
        assert!(check(&overlapping));
    }

    #[test]
    fn an_unknown_outcome_may_come_late_or_never() {
        let unknown = Call {
            start: 0,
            end: None,
            operation: Operation::Put(7),
        };
        assert!(check(&[
            unknown.clone(),
            call(1, 2, Operation::Read(None)),
            call(3, 4, Operation::Read(Some(7)))
        ]));
        assert!(check(&[unknown.clone(), call(1, 2, Operation::Read(None))]));
        assert!(!check(&[
            unknown,
            call(1, 2, Operation::Read(Some(7))),
            call(3, 4, Operation::Read(None))
        ]));
    }
}
