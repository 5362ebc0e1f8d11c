//! What of a tenant's archive its window needs: decided from what is there, and nothing else.
//!
//! Invariants. Every moment inside the window can be restored from what is kept, whichever incarnation
//! it lies in, by the rules of `restore::plan`. The newest whole checkpoints and the links behind the
//! oldest of them stay, whatever the clock says. Of each incarnation its last link stays: it says
//! where it ended. Nothing else that the window does not need is kept but what lies between.

use std::collections::{BTreeMap, BTreeSet};

use super::link::Base;

/// Checkpoints that only make a restore to an earlier moment quicker: one a day is enough.
pub const SPACING_MS: u64 = 24 * 3600 * 1000;

/// A checkpoint, as its manifest says.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Candidate {
    /// The object's name.
    pub object: String,
    pub link: u64,
    pub index: u64,
    /// Effective time, 0 where it is not said.
    pub time_ms: u64,
    /// The manifest authenticates and each of its files is there. A restore needs a whole one.
    pub whole: bool,
}

/// What is in the bucket of one incarnation.
#[derive(Clone, Debug, Default)]
pub struct Incarnation {
    /// Number of the newest link; 0: there is none.
    pub last: u64,
    /// Its first link is there, and what leads to it.
    pub begins: bool,
    /// How it begins, as its first link says; none of the first incarnation, or if that link is gone.
    pub base: Option<Base>,
    /// Effective time of the first link, if it says so.
    pub opening_ms: Option<u64>,
    pub checkpoints: Vec<Candidate>,
}

/// What stays of an incarnation.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Kept {
    /// The first link that stays.
    pub from: u64,
    pub checkpoints: BTreeSet<String>,
}

struct Deciding<'a> {
    found: &'a BTreeMap<u32, Incarnation>,
    horizon_ms: u64,
    /// Of the incarnations that something is needed of.
    needed: BTreeMap<u32, Kept>,
}

/// What stays so that every moment since `horizon_ms` can be restored; `newest`: so many checkpoints
/// of the newest incarnation stay besides, with every link behind them.
pub fn keep(
    found: &BTreeMap<u32, Incarnation>,
    horizon_ms: u64,
    newest: usize,
) -> BTreeMap<u32, Kept> {
    let mut deciding = Deciding {
        found,
        horizon_ms,
        needed: BTreeMap::new(),
    };
    if let Some((last, incarnation)) = found.last_key_value() {
        deciding.moments(*last);
        let whole = ordered(incarnation);
        for checkpoint in whole.iter().rev().take(newest) {
            deciding.begin(*last, checkpoint);
        }
        if whole.len() < newest {
            // Another way to the newest state stays instead.
            deciding.all_links(*last);
            if let Some(base) = &incarnation.base {
                deciding.beginning(base);
            }
        }
    }
    deciding.between();
    let mut kept = deciding.needed;
    for (number, incarnation) in found {
        let kept = kept.entry(*number).or_insert_with(|| Kept {
            from: incarnation.last,
            checkpoints: BTreeSet::new(),
        });
        kept.from = kept.from.min(incarnation.last);
    }
    kept
}

/// The whole checkpoints, oldest first.
fn ordered(incarnation: &Incarnation) -> Vec<&Candidate> {
    let whole = incarnation.checkpoints.iter().filter(|c| c.whole);
    let mut ordered: Vec<_> = whole.collect();
    ordered.sort_by_key(|c| (c.index, c.link));
    ordered
}

impl Deciding<'_> {
    /// Every moment of `number` since the horizon, and of those before it that it began in.
    fn moments(&mut self, number: u32) {
        let Some(incarnation) = self.found.get(&number) else {
            return;
        };
        let mut before = ordered(incarnation);
        before.retain(|c| c.time_ms > 0 && c.time_ms <= self.horizon_ms);
        if let Some(checkpoint) = before.last() {
            return self.begin(number, checkpoint);
        }
        self.all_links(number);
        let Some(base) = &incarnation.base else {
            return;
        };
        self.beginning(base);
        if incarnation.opening_ms.is_none_or(|at| at > self.horizon_ms) {
            self.moments(base.incarnation);
        }
    }

    /// The state that an incarnation began with.
    fn beginning(&mut self, base: &Base) {
        let origin = base.origin.as_ref();
        let number = origin.map_or(base.incarnation, |origin| origin.incarnation);
        let cut = origin.is_some_and(|origin| origin.revision.is_some());
        self.state(number, base.position.index.saturating_sub(u64::from(cut)));
    }

    /// A state of `number`, which a checkpoint up to entry `index` leads to.
    fn state(&mut self, number: u32, index: u64) {
        let Some(incarnation) = self.found.get(&number) else {
            return;
        };
        let mut before = ordered(incarnation);
        before.retain(|c| c.index <= index);
        if let Some(checkpoint) = before.last() {
            return self.begin(number, checkpoint);
        }
        self.all_links(number);
        if let Some(base) = &incarnation.base {
            self.beginning(base);
        }
    }

    /// A restore begins with this checkpoint.
    fn begin(&mut self, number: u32, checkpoint: &Candidate) {
        let needed = self.needed.entry(number).or_insert_with(|| Kept {
            from: checkpoint.link,
            checkpoints: BTreeSet::new(),
        });
        needed.from = needed.from.min(checkpoint.link);
        needed.checkpoints.insert(checkpoint.object.clone());
    }

    fn all_links(&mut self, number: u32) {
        self.needed.entry(number).or_default().from = 0;
    }

    /// Of the checkpoints behind the first link that stays: those that cannot be judged, and the
    /// first one of each day.
    fn between(&mut self) {
        for (number, kept) in &mut self.needed {
            let mut inside: Vec<_> = self.found[number].checkpoints.iter().collect();
            inside.retain(|c| c.link >= kept.from);
            inside.sort_by_key(|c| (c.index, c.link));
            let mut day = None;
            for checkpoint in inside {
                let judged = checkpoint.whole && checkpoint.time_ms > 0;
                let of = checkpoint.time_ms / SPACING_MS;
                if !judged || day.replace(of) != Some(of) {
                    kept.checkpoints.insert(checkpoint.object.clone());
                }
            }
        }
    }
}
