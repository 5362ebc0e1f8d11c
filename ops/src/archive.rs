//! `holdfast archive`: what of a tenant's history is in the bucket, as a picture.

use std::path::Path;
use std::process::ExitCode;

use daemon::admin_client::OperatorConfig;
use daemon::proto::admin::{Archive, ArchiveChain, ListArchiveRequest};
use replication::clock::utc;

use crate::args::ArchiveCommand;
use crate::table;
use crate::tenant::said;

/// Characters of the time line.
const WIDTH: u64 = 60;

pub async fn run(config: &Path, command: ArchiveCommand) -> Result<ExitCode, String> {
    let ArchiveCommand::Ls { tenant } = command;
    let mut client = OperatorConfig::load(config)?.connect().await?;
    let request = ListArchiveRequest {
        name: tenant.clone(),
    };
    let archive = client
        .list_archive(request)
        .await
        .map_err(said)?
        .into_inner();
    print!("{}", draw(&tenant, &archive));
    Ok(ExitCode::SUCCESS)
}

fn bytes(n: u64) -> String {
    match n {
        0..10_000 => format!("{n} B"),
        10_000..10_000_000 => format!("{} kB", n / 1_000),
        _ => format!("{} MB", n / 1_000_000),
    }
}

/// The line of one chain: `=` is kept and can be restored, `O` a checkpoint, `x` where a restore has
/// closed it, `>` where it goes on.
fn line(chain: &ArchiveChain, from: u64, to: u64) -> String {
    let at = |ms: u64| (ms.saturating_sub(from) * (WIDTH - 1) / (to - from).max(1)) as usize;
    let mut line = vec![' '; WIDTH as usize];
    let first = match chain.whole {
        true => chain.from_ms,
        false => chain.checkpoints.first().map_or(chain.to_ms, |c| c.at_ms),
    };
    let (first, last) = (at(first), at(chain.to_ms));
    line[first.min(last)..=last].fill('=');
    for checkpoint in &chain.checkpoints {
        line[at(checkpoint.at_ms).min(WIDTH as usize - 1)] = 'O';
    }
    line[last] = if chain.closed { 'x' } else { '>' };
    line.into_iter().collect()
}

fn draw(tenant: &str, archive: &Archive) -> String {
    let kept: Vec<&ArchiveChain> = archive.chains.iter().filter(|c| c.links > 0).collect();
    let (Some(from), Some(to)) = (
        kept.iter().map(|c| c.from_ms).min(),
        kept.iter().map(|c| c.to_ms).max(),
    ) else {
        return format!("Nothing of {tenant} is in the bucket yet.\n");
    };
    let mut out = format!("{tenant}, from {} to {}\n\n", utc(from), utc(to));
    for chain in &kept {
        out.push_str(&format!(
            "incarnation {:<3} [{}] links {} to {}, {}\n",
            chain.incarnation,
            line(chain, from, to),
            chain.first_link,
            chain.last_link,
            bytes(chain.bytes),
        ));
        for checkpoint in &chain.checkpoints {
            out.push_str(&format!(
                "    checkpoint at revision {}, {}, behind link {}, {}\n",
                checkpoint.revision,
                utc(checkpoint.time_ms),
                checkpoint.link,
                bytes(checkpoint.bytes),
            ));
        }
    }
    out.push_str("\n=: can be restored, to any revision and moment; O: a checkpoint; x: a restore closed it; >: it goes on\n");
    for chain in &kept {
        let first = chain.checkpoints.first();
        match (chain.whole, first) {
            (true, _) => out.push_str(&format!(
                "incarnation {} can be restored from its beginning on",
                chain.incarnation
            )),
            (false, Some(first)) => out.push_str(&format!(
                "incarnation {} can be restored from revision {} ({}) on",
                chain.incarnation,
                first.revision,
                utc(first.time_ms)
            )),
            (false, None) => out.push_str(&format!(
                "incarnation {} cannot be restored: only its end is kept",
                chain.incarnation
            )),
        }
        out.push('\n');
    }
    if let Some(newest) = kept.last() {
        let duration = table::duration(to.saturating_sub(newest.from_ms));
        out.push_str(&format!(
            "a restore to the newest state replays {} behind its checkpoint; incarnation {} is {duration} old\n",
            bytes(newest.behind_bytes),
            newest.incarnation,
        ));
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;
    use daemon::proto::admin::ArchiveCheckpoint;

    #[test]
    fn a_chain_is_drawn_where_it_can_be_restored() {
        let mut chain = ArchiveChain {
            from_ms: 0,
            to_ms: 590,
            closed: true,
            whole: true,
            ..ArchiveChain::default()
        };
        assert_eq!(line(&chain, 0, 590), format!("{}x", "=".repeat(59)));
        chain.whole = false;
        chain.closed = false;
        chain.checkpoints.push(ArchiveCheckpoint {
            at_ms: 300,
            ..ArchiveCheckpoint::default()
        });
        let drawn = line(&chain, 0, 590);
        assert_eq!(drawn, format!("{}O{}>", " ".repeat(30), "=".repeat(28)));
        let nothing = draw("acme", &Archive::default());
        assert_eq!(nothing, "Nothing of acme is in the bucket yet.\n");
    }
}
