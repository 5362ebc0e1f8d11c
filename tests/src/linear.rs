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

/// Whether the history of one key, empty at first, is linearizable.
pub fn check(history: &[Call]) -> bool {
    let mut calls: Vec<&Call> = history.iter().collect();
    calls.sort_by_key(|c| c.start);
    let mut seen = HashSet::new();
    // Depth first: which calls are done, and the value after them.
    let mut open: Vec<(Vec<bool>, Option<u64>)> = vec![(vec![false; calls.len()], None)];
    while let Some((done, value)) = open.pop() {
        let required = calls.iter().zip(&done).filter(|(c, d)| !**d && c.end.is_some());
        let Some(first_end) = required.filter_map(|(c, _)| c.end).min() else {
            return true;
        };
        for (n, call) in calls.iter().enumerate() {
            if done[n] || call.start > first_end {
                continue;
            }
            if let Some(next) = step(value, &call.operation) {
                let mut done = done.clone();
                done[n] = true;
                if seen.insert((done.clone(), next)) {
                    open.push((done, next));
                }
            }
        }
    }
    false
}

#[cfg(test)]
mod tests {
    use super::*;

    fn call(start: u64, end: u64, operation: Operation) -> Call {
        Call { start, end: Some(end), operation }
    }

    #[test]
    fn a_stale_read_is_found() {
        let stale = [call(0, 1, Operation::Put(1)), call(2, 3, Operation::Put(2)), call(4, 5, Operation::Read(Some(1)))];
        assert!(!check(&stale));
        let overlapping = [call(0, 1, Operation::Put(1)), call(2, 5, Operation::Put(2)), call(3, 4, Operation::Read(Some(1)))];
        assert!(check(&overlapping));
    }

    #[test]
    fn an_unknown_outcome_may_come_late_or_never() {
        let unknown = Call { start: 0, end: None, operation: Operation::Put(7) };
        assert!(check(&[unknown.clone(), call(1, 2, Operation::Read(None)), call(3, 4, Operation::Read(Some(7)))]));
        assert!(check(&[unknown.clone(), call(1, 2, Operation::Read(None))]));
        assert!(!check(&[unknown, call(1, 2, Operation::Read(Some(7))), call(3, 4, Operation::Read(None))]));
    }
}
