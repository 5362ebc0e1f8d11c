//! `holdfast archive`: what of a tenant's history, or the directory's, is in the bucket, as a picture; what goes,
//! what is held.

use std::path::Path;
use std::process::ExitCode;

use daemon::admin_client::OperatorConfig;
use daemon::proto::admin::{
    Archive, ArchiveChain, Hold, HoldArchiveRequest, ListArchiveRequest, MakeCheckpointRequest,
    ReleaseArchiveRequest, ScrubArchiveRequest, SweepArchiveRequest, SweepArchiveResponse,
};
use replication::clock::utc;

use crate::args::ArchiveCommand;
use crate::table;
use crate::tenant::said;

/// Characters of the time line.
const WIDTH: u64 = 60;

pub async fn run(config: &Path, command: ArchiveCommand) -> Result<ExitCode, String> {
    let mut client = OperatorConfig::load(config)?.connect().await?;
    match command {
        ArchiveCommand::Ls { tenant } => {
            let request = ListArchiveRequest {
                name: tenant.clone(),
            };
            let archive = client.list_archive(request).await.map_err(said)?;
            print!("{}", draw(&tenant, &archive.into_inner()));
        }
        ArchiveCommand::Checkpoint(whose) => {
            let request = MakeCheckpointRequest {
                directory: whose.directory,
                name: whose.tenant.unwrap_or_default(),
            };
            let made = client.make_checkpoint(request).await.map_err(said)?;
            let made = made.into_inner();
            println!(
                "A checkpoint at revision {}, {}, is in the bucket: {}.",
                made.revision,
                utc(made.time_ms),
                bytes(made.bytes)
            );
        }
        ArchiveCommand::Scrub(whose) => {
            let read = whose.tenant.as_deref().unwrap_or("the directory");
            let request = ScrubArchiveRequest {
                directory: whose.directory,
                name: whose.tenant.clone().unwrap_or_default(),
            };
            let found = client.scrub_archive(request).await.map_err(said)?;
            let found = found.into_inner();
            for damage in &found.damages {
                println!("{damage}");
            }
            println!(
                "{} objects of {read} were read back, {}; {} are damaged or missing.",
                found.objects,
                bytes(found.bytes),
                found.damages.len()
            );
            if !found.damages.is_empty() {
                println!("A new checkpoint was made, and is whole.");
            }
        }
        ArchiveCommand::Sweep { whose, dry_run } => {
            let request = SweepArchiveRequest {
                directory: whose.directory,
                name: whose.tenant.unwrap_or_default(),
                dry_run,
            };
            let swept = client.sweep_archive(request).await.map_err(said)?;
            print!("{}", listed(&swept.into_inner(), dry_run));
        }
        ArchiveCommand::Hold {
            tenant,
            since,
            reason,
        } => {
            let request = HoldArchiveRequest {
                name: tenant,
                since_ms: since.unwrap_or(0),
                reason,
            };
            let hold = client.hold_archive(request).await.map_err(said)?;
            println!("Hold {} stands.", hold.into_inner().id);
        }
        ArchiveCommand::Release { tenant, hold } => {
            let request = ReleaseArchiveRequest {
                name: tenant,
                id: hold.clone(),
            };
            client.release_archive(request).await.map_err(said)?;
            println!("Hold {hold} is released.");
        }
    }
    Ok(ExitCode::SUCCESS)
}

fn standing(holds: &[Hold]) -> String {
    let line = |hold: &Hold| {
        let since = match hold.since_ms {
            0 => "everything".into(),
            ms => format!("everything since {}", utc(ms)),
        };
        format!("hold {}: {since} stays: {}\n", hold.id, hold.reason)
    };
    holds.iter().map(line).collect()
}

/// Every object that goes, then how many of each kind.
fn listed(swept: &SweepArchiveResponse, dry_run: bool) -> String {
    let mut out = String::new();
    let kinds = [
        ("checkpoint", &swept.checkpoints),
        ("link", &swept.links),
        ("file", &swept.files),
        ("upload", &swept.unfinished),
    ];
    for (kind, objects) in kinds {
        for object in objects {
            out.push_str(&format!("{kind:<10} {object}\n"));
        }
    }
    for object in &swept.unreadable {
        out.push_str(&format!(
            "no file goes while this does not read: {object}\n"
        ));
    }
    for kept in &swept.locked {
        out.push_str(&format!("kept by the store: {kept}\n"));
    }
    out.push_str(&standing(&swept.holds));
    let counts = kinds.map(|(kind, objects)| format!("{} {kind}s", objects.len()));
    out.push_str(&format!(
        "{}: {}, {} of links and files. The window begins at {}.\n",
        if dry_run { "Would go" } else { "Gone" },
        counts.join(", "),
        bytes(swept.bytes),
        utc(swept.horizon_ms)
    ));
    out
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
    out.push_str(&format!(
        "kept: every moment of {}, and the newest {} checkpoints\n",
        table::duration(archive.keep_ms),
        archive.keep_checkpoints
    ));
    out.push_str(&standing(&archive.holds));
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
