//! Moments at which a test can have the process killed, named by `HOLDFAST_TEST_KILL_AT`.

use std::sync::LazyLock;

static KILL_AT: LazyLock<Option<String>> =
    LazyLock::new(|| std::env::var("HOLDFAST_TEST_KILL_AT").ok());

/// Ends the process, as SIGKILL would, if this is the moment that the test named.
pub fn failpoint(moment: &str) {
    if KILL_AT.as_deref() == Some(moment) {
        tracing::error!(moment, "killed here for a test");
        std::process::abort();
    }
}
