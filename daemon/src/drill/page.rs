//! A drill's evidence as one HTML file, which needs nothing else.

use std::fmt::Write as _;

use replication::clock::utc;

use super::Evidence;
use crate::signed::Signed;

/// Width of the timeline, in pixels.
const WIDTH: f64 = 900.0;
const ROW: usize = 28;
const LABEL: f64 = 140.0;

const STYLE: &str = "body{font:15px/1.5 system-ui,sans-serif;margin:2rem auto;max-width:72rem;padding:0 1rem;color:#1c2733}\
h1{font-size:1.4rem}table{border-collapse:collapse}td,th{padding:.2rem .8rem .2rem 0;text-align:left;vertical-align:top}\
.ok{color:#17703a}.bad{color:#b3261e}pre{white-space:pre-wrap;word-break:break-all;background:#f3f5f7;padding:1rem}\
svg text{font:13px system-ui,sans-serif}";

fn escape(text: &str) -> String {
    let mut out = String::with_capacity(text.len());
    for c in text.chars() {
        match c {
            '&' => out.push_str("&amp;"),
            '<' => out.push_str("&lt;"),
            '>' => out.push_str("&gt;"),
            '"' => out.push_str("&quot;"),
            '\'' => out.push_str("&#39;"),
            c => out.push(c),
        }
    }
    out
}

fn timeline(evidence: &Evidence) -> String {
    let end = evidence.phases.last().map_or(1, |p| p.to_ms.max(1)) as f64;
    let scale = (WIDTH - LABEL - 200.0) / end;
    let height = evidence.phases.len() * ROW + 10;
    let mut out = format!(
        "<svg role=\"img\" aria-label=\"timeline\" width=\"{WIDTH}\" height=\"{height}\" viewBox=\"0 0 {WIDTH} {height}\">"
    );
    for (n, phase) in evidence.phases.iter().enumerate() {
        let y = n * ROW;
        let from = LABEL + phase.from_ms as f64 * scale;
        let took = phase.to_ms - phase.from_ms;
        let width = (took as f64 * scale).max(2.0);
        let pauses = match phase.paused_ms {
            0 => String::new(),
            paused => format!(" ({paused} paused)"),
        };
        let _ = write!(
            out,
            "<text x=\"0\" y=\"{}\">{}</text><rect x=\"{from:.1}\" y=\"{}\" width=\"{width:.1}\" height=\"16\" rx=\"2\" fill=\"#3a6ea5\"/><text x=\"{:.1}\" y=\"{}\">{took} ms{pauses}</text>",
            y + 18,
            escape(&phase.name),
            y + 5,
            from + width + 6.0,
            y + 18,
        );
    }
    out.push_str("</svg>");
    out
}

/// The page of a signed drill.
pub fn page(signed: &Signed) -> Result<String, String> {
    let e: Evidence = serde_json::from_str(&signed.body).map_err(|e| e.to_string())?;
    let (class, verdict) = match e.passed {
        true => ("ok", "passed".to_string()),
        false => ("bad", format!("FAILED: {}. {}", e.problem, e.advice)),
    };
    let live = match (&e.live_digest, e.passed) {
        (Some(_), _) => "compared with the live replica's at the same entry",
        (None, _) => "the live replica no longer knows its own at that entry",
    };
    let rows = [
        (
            "Tenant",
            format!("{} ({}), {}", e.tenant, e.id, e.tier.name()),
        ),
        (
            "Restored from",
            format!(
                "{}, incarnation {}, up to link {}",
                e.bucket, e.incarnation, e.link
            ),
        ),
        (
            "Restored on",
            format!(
                "{}, jurisdiction {}, where no client reaches it; removed afterwards",
                e.node, e.jurisdiction
            ),
        ),
        ("Begun", utc(e.begun_ms)),
        (
            "State",
            format!(
                "revision {}, newest write of {}",
                e.revision,
                utc(e.time_ms)
            ),
        ),
        (
            "Digest",
            format!(
                "{}: counted from every row, equal to the archive's; {live}",
                e.digest
            ),
        ),
        (
            "Sample",
            format!(
                "{} keys, {} differ, {} not comparable any more",
                e.sample.keys, e.sample.differ, e.sample.not_comparable
            ),
        ),
        (
            "RTO",
            format!(
                "{} ms to verified reads, without {} ms of pauses for the live tenants; {} ms contracted",
                e.rto_ms, e.paused_ms, e.rto_contract_ms
            ),
        ),
        (
            "RPO",
            format!("{} ms; {} ms contracted", e.rpo_ms, e.rpo_contract_ms),
        ),
        (
            "Read",
            format!(
                "{} bytes of a checkpoint, {} links with {} bytes of log",
                e.checkpoint_bytes, e.links, e.log_bytes
            ),
        ),
    ];
    let mut table = String::new();
    for (what, value) in rows {
        let _ = write!(table, "<tr><th>{what}</th><td>{}</td></tr>", escape(&value));
    }
    let statement = serde_json::to_string_pretty(signed).map_err(|e| e.to_string())?;
    Ok(format!(
        "<!DOCTYPE html>\n<html lang=\"en\"><head><meta charset=\"utf-8\"><title>Drill of {name}</title><style>{STYLE}</style></head>\
<body><h1>Recovery drill of {name}: <span class=\"{class}\">{verdict}</span></h1><table>{table}</table><h2>Timeline</h2>{timeline}\
<h2>Signed statement</h2><p>Saved to a file, <code>holdfast drill verify FILE</code> checks it offline.</p><pre>{statement}</pre></body></html>\n",
        name = escape(&e.tenant),
        verdict = escape(&verdict),
        timeline = timeline(&e),
        statement = escape(&statement),
    ))
}
