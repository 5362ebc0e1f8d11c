//! A drill's threads: they run when nothing else wants to, so that live requests find their core free.
//!
//! Invariants. A thread that waits long for its core must not hold what others need: before a drill looks at
//! the live replica, and as soon as the tenant is sealed, which waits for the drill to let go of its keys,
//! its threads are ordinary ones again. What they share until then are the allocator, the slots of
//! `kms::guarded` and the log's output, each held for less than a microsecond. Where the system does not let a thread come back
//! (RLIMIT_NICE, `LimitNICE=+15` in the unit), low priority is all there is.
#![allow(unsafe_code)]

use std::sync::atomic::{AtomicBool, Ordering};

use parking_lot::Mutex;
use rustix::process::{Resource, getrlimit, setpriority_process};
use rustix::thread::{Pid, gettid};

/// Niceness of a thread that is not idle.
const NICE: i32 = 15;
/// What RLIMIT_NICE must be for a thread of niceness 15 to come back from idle: 20 less that.
const NICE_LIMIT: u64 = 5;

#[derive(Default)]
pub struct Threads {
    all: Mutex<Vec<Pid>>,
    /// None is idle from now on.
    raised: AtomicBool,
}

fn set_policy(thread: Pid, policy: i32) -> std::io::Result<()> {
    let parameters = libc::sched_param { sched_priority: 0 };
    // SAFETY: reads the parameters; the thread is of this process, or is gone, which is an error.
    let set = unsafe {
        libc::sched_setscheduler(thread.as_raw_nonzero().get(), policy, &raw const parameters)
    };
    match set {
        0 => Ok(()),
        _ => Err(std::io::Error::last_os_error()),
    }
}

/// CPU time of the calling thread.
pub fn cpu_time() -> std::time::Duration {
    let mut now = libc::timespec {
        tv_sec: 0,
        tv_nsec: 0,
    };
    // SAFETY: writes to the given time, which outlives the call.
    unsafe { libc::clock_gettime(libc::CLOCK_THREAD_CPUTIME_ID, &raw mut now) };
    std::time::Duration::new(now.tv_sec as u64, now.tv_nsec as u32)
}

/// Whether an idle thread may become an ordinary one again.
fn can_come_back() -> bool {
    let limit = getrlimit(Resource::Nice).current;
    rustix::process::geteuid().is_root() || limit.is_none_or(|limit| limit >= NICE_LIMIT)
}

impl Threads {
    /// Lowers the calling thread's priority.
    pub fn lower(&self) {
        let own = gettid();
        if let Err(e) = setpriority_process(Some(own), NICE) {
            tracing::warn!(error = %e, "a drill runs at the daemon's own priority");
        }
        if !can_come_back() {
            return;
        }
        // Known before it is idle, and looked at again after: who raises misses none, and waits for none.
        self.all.lock().push(own);
        if let Err(e) = set_policy(own, libc::SCHED_IDLE) {
            tracing::warn!(error = %e, "a drill's thread is not idle");
        }
        if self.raised.load(Ordering::SeqCst) {
            let _ = set_policy(own, libc::SCHED_OTHER);
        }
    }

    /// Makes all of them ordinary threads of low priority.
    pub fn raise(&self) {
        self.raised.store(true, Ordering::SeqCst);
        for thread in std::mem::take(&mut *self.all.lock()) {
            // It may have ended.
            let _ = set_policy(thread, libc::SCHED_OTHER);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::Arc;

    fn policy() -> i32 {
        // SAFETY: asks for the calling thread.
        unsafe { libc::sched_getscheduler(0) }
    }

    #[test]
    fn an_idle_thread_is_raised_and_later_ones_are_not_idle() {
        // Without that permission it is an ordinary one from the start.
        let first = match can_come_back() {
            true => libc::SCHED_IDLE,
            false => libc::SCHED_OTHER,
        };
        let threads = Arc::new(Threads::default());
        let (own, (lowered, heard)) = (threads.clone(), std::sync::mpsc::channel());
        let (go, on) = std::sync::mpsc::channel();
        let idle = std::thread::spawn(move || {
            own.lower();
            lowered.send(policy()).expect("heard");
            on.recv().expect("goes on");
            policy()
        });
        assert_eq!(heard.recv().expect("it says"), first);
        threads.raise();
        go.send(()).expect("it waits");
        assert_eq!(idle.join().expect("it ends"), libc::SCHED_OTHER);
        let own = threads.clone();
        let late = std::thread::spawn(move || {
            own.lower();
            policy()
        });
        assert_eq!(late.join().expect("it ends"), libc::SCHED_OTHER);
    }
}
