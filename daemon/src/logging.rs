//! Logs on standard error, as text or JSON. Nothing logs a key, a value or a user's name.

use std::io::IsTerminal;

use tracing_subscriber::EnvFilter;

use crate::config::LogConfig;

pub fn start(config: &LogConfig) {
    let filter = config.filter.as_deref().unwrap_or("info,openraft=error");
    let filter = EnvFilter::try_new(filter).unwrap_or_else(|_| EnvFilter::new("info"));
    let builder = tracing_subscriber::fmt()
        .with_env_filter(filter)
        .with_ansi(std::io::stderr().is_terminal())
        .with_writer(std::io::stderr);
    // A second start, in a process that has several nodes, keeps the first.
    let _ = match config.json {
        true => builder.json().try_init(),
        false => builder.try_init(),
    };
}
