//! Moments as people write them.

use time::OffsetDateTime;
use time::format_description::well_known::Rfc3339;

/// Milliseconds since 1970 in RFC 3339, in UTC; the number itself where that cannot write it.
pub fn utc(ms: u64) -> String {
    let at = OffsetDateTime::from_unix_timestamp_nanos(i128::from(ms) * 1_000_000);
    let written = at.ok().and_then(|at| at.format(&Rfc3339).ok());
    written.unwrap_or_else(|| format!("{ms} ms after 1970"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn moments_are_written() {
        assert_eq!(utc(1_500), "1970-01-01T00:00:01.5Z");
        assert_eq!(utc(u64::MAX), format!("{} ms after 1970", u64::MAX));
    }
}
