//! What can be asked for on the command line.

use std::path::PathBuf;

use clap::{Args, Parser, Subcommand};
use kms::Region;
use time::OffsetDateTime;
use time::format_description::well_known::Rfc3339;

#[derive(Parser)]
#[command(version, about = "Operates a Holdfast region")]
pub struct Arguments {
    /// operator.toml, as `holdfast init` writes it.
    #[arg(long, global = true, default_value = "operator.toml")]
    pub config: PathBuf,
    #[command(subcommand)]
    pub command: Command,
}

#[derive(Subcommand)]
pub enum Command {
    /// Writes certificates, a keyfile and a node.toml for each node of a new region.
    Init(Init),
    /// Keys in a keyfile, for development and air-gapped sites.
    Keyfile {
        #[command(subcommand)]
        command: KeyfileCommand,
    },
    /// Tenants: create, list, show, set, delete, undelete.
    Tenant {
        #[command(subcommand)]
        command: TenantCommand,
    },
    /// A tenant's key: a new data key, or another KMS key.
    Key {
        #[command(subcommand)]
        command: KeyCommand,
    },
    /// What happened to tenants: sealed, resumed, rotated.
    Events {
        /// Of this tenant only.
        #[arg(long)]
        tenant: Option<String>,
    },
    /// Where everything of a tenant lies, and who says so.
    Residency {
        tenant: String,
        /// The signed report; `certificate verify` checks it.
        #[arg(long)]
        json: bool,
    },
    /// Signed statements of the region.
    Certificate {
        #[command(subcommand)]
        command: CertificateCommand,
    },
    /// What of a tenant's history, or the directory's, is in the bucket.
    Archive {
        #[command(subcommand)]
        command: ArchiveCommand,
    },
    /// Every tenant's recovery objectives, contracted and now, the worst first.
    Objectives {
        /// This tenant's in the last 35 days instead: the worst of each hour.
        #[arg(long)]
        history: Option<String>,
        #[arg(long)]
        json: bool,
    },
    /// Recovery drills: a restore that is tried, proven and measured, and its evidence.
    Drill {
        #[command(subcommand)]
        command: DrillCommand,
    },
    /// How each node stands.
    Node,
    /// The declared loss of a region.
    Disaster {
        #[command(subcommand)]
        command: DisasterCommand,
    },
    /// Restores from the bucket.
    Restore {
        #[command(subcommand)]
        command: RestoreCommand,
    },
}

#[derive(Args)]
pub struct Init {
    /// us, eu, au or jp.
    #[arg(long)]
    pub region: Region,
    #[arg(long, default_value_t = 3)]
    pub nodes: usize,
    /// Where everything is written.
    #[arg(long, default_value = ".")]
    pub dir: PathBuf,
    /// s3://BUCKET/PREFIX or file:///DIRECTORY; DIR/bucket if not given.
    #[arg(long)]
    pub bucket: Option<String>,
    /// The cloud region of an S3 bucket.
    #[arg(long)]
    pub cloud_region: Option<String>,
    /// An S3 endpoint other than AWS's.
    #[arg(long)]
    pub endpoint: Option<String>,
    /// The first of three ports a node on loopback; free ones if 0.
    #[arg(long, default_value_t = 2379)]
    pub port: u16,
}

#[derive(Subcommand)]
pub enum KeyfileCommand {
    /// Adds a key with fresh material.
    Add {
        file: PathBuf,
        name: String,
    },
    Enable {
        file: PathBuf,
        name: String,
    },
    Disable {
        file: PathBuf,
        name: String,
    },
    ScheduleDeletion {
        file: PathBuf,
        name: String,
    },
}

#[derive(Subcommand)]
pub enum TenantCommand {
    Create(Create),
    List,
    Show {
        name: String,
    },
    /// Changes what a tenant's record says.
    Set(Set),
    /// Deletes a tenant: it is served no more, and destroyed once the grace has passed.
    Delete {
        name: String,
        /// How long it can be brought back, such as 30d; 0s destroys it now.
        #[arg(long, default_value = "30d")]
        grace: String,
    },
    /// Brings a deleted tenant back within its grace.
    Undelete {
        name: String,
    },
}

#[derive(Args)]
pub struct Set {
    pub name: String,
    /// How long it is served while its KMS does not answer: 0s to 24h.
    #[arg(long)]
    pub key_grace: Option<String>,
    /// Days between scheduled rotations of the data key; 0 for none.
    #[arg(long)]
    pub rotate_days: Option<u32>,
    /// How often a drill is run, such as 1d; 0s for none.
    #[arg(long)]
    pub drill_every: Option<String>,
    /// Writes are refused once the oldest one that is not in the bucket is older than this, such as
    /// 1m; 0s for never.
    #[arg(long)]
    pub max_unarchived: Option<String>,
    /// How far back every moment can be restored, such as 35d.
    #[arg(long)]
    pub keep: Option<String>,
    /// How many of the newest checkpoints stay in any case.
    #[arg(long)]
    pub keep_checkpoints: Option<u32>,
}

/// Whose archive.
#[derive(Args)]
#[group(required = true, multiple = false)]
pub struct Whose {
    pub tenant: Option<String>,
    /// The region's directory, in a tenant's place.
    #[arg(long)]
    pub directory: bool,
}

#[derive(Subcommand)]
pub enum ArchiveCommand {
    /// Draws the chains and checkpoints of a tenant, and says what can be restored.
    Ls { tenant: String },
    /// Uploads a checkpoint of the present state, before something that may go wrong.
    Checkpoint(Whose),
    /// Reads everything back and authenticates it, as nodes do by themselves each week; what is damaged
    /// is named, and healed from the live replicas.
    Scrub(Whose),
    /// Deletes what the window does not need, as the leader does by itself each hour.
    Sweep {
        #[command(flatten)]
        whose: Whose,
        /// Only lists what would go.
        #[arg(long)]
        dry_run: bool,
    },
    /// Keeps the tenant's history, whatever its window, until that is released.
    Hold {
        tenant: String,
        /// Everything since this moment, such as 2026-11-22T10:00:00Z; all that there is if not given.
        #[arg(long, value_parser = moment)]
        since: Option<u64>,
        /// Why, such as the number of a case.
        #[arg(long)]
        reason: String,
    },
    /// Releases a hold.
    Release { tenant: String, hold: String },
}

#[derive(Subcommand)]
pub enum DrillCommand {
    /// Restores a tenant from the bucket where no client reaches it, proves it, and removes it.
    Run { tenant: String },
    /// The drills of a tenant, from their evidence in the bucket.
    Ls { tenant: String },
    /// Prints the newest drill's signed evidence.
    Show {
        tenant: String,
        /// As a page, HTML.
        #[arg(long)]
        html: bool,
    },
    /// Checks a drill's evidence offline and prints what it says.
    Verify {
        file: PathBuf,
        /// The region's certificate authority.
        #[arg(long, default_value = "ca.pem")]
        ca: PathBuf,
    },
}

#[derive(Subcommand)]
pub enum CertificateCommand {
    /// Prints the certificate of a tenant's destruction.
    Show { tenant: String },
    /// Checks a signed statement offline and prints what it says.
    Verify {
        file: PathBuf,
        /// The region's certificate authority.
        #[arg(long, default_value = "ca.pem")]
        ca: PathBuf,
    },
}

#[derive(Subcommand)]
pub enum KeyCommand {
    /// Makes a new data key: new writes use it at once, what is older stays readable.
    Rotate {
        tenant: String,
        /// Moves everything to the new generation, and destroys the older ones: files, log and
        /// archive, which begins anew at a checkpoint.
        #[arg(long)]
        rewrite: bool,
    },
    /// Moves the tenant to another KMS key, of any provider. Once it is done the old key can go.
    Change {
        tenant: String,
        /// local:NAME or arn:aws:kms:REGION:ACCOUNT:key/ID.
        #[arg(long)]
        key: String,
    },
}

#[derive(Args)]
pub struct Create {
    pub name: String,
    /// enhanced or standard.
    #[arg(long, default_value = "standard")]
    pub tier: String,
    /// Recovery point objective, such as 1s or 15m; the tier's if not given. 0s: a write is answered
    /// once it is in the bucket.
    #[arg(long)]
    pub rpo: Option<String>,
    /// Recovery time objective; the tier's if not given.
    #[arg(long)]
    pub rto: Option<String>,
    /// local:NAME or arn:aws:kms:REGION:ACCOUNT:key/ID.
    #[arg(long)]
    pub key: String,
    /// The first user, who manages the others.
    #[arg(long, default_value = "root")]
    pub user: String,
    /// The first user's password; read from standard input if not given.
    #[arg(long)]
    pub password: Option<String>,
    /// Bytes of keys and values, all versions; the default if not given.
    #[arg(long)]
    pub quota: Option<u64>,
    /// How long the tenant is served while its KMS does not answer: 0s to 24h; 10m if not given.
    #[arg(long)]
    pub key_grace: Option<String>,
}

#[derive(Subcommand)]
pub enum DisasterCommand {
    /// Restores a lost region onto fresh nodes, tenants by deadline, and leaves a signed report of
    /// contracted against actual RPO and RTO. Given again it goes on with what is left.
    Declare {
        /// us, eu, au or jp: that of the nodes.
        #[arg(long)]
        region: Region,
        /// When the region was lost, in seconds since 1970, for the actual RPO; now if not given.
        #[arg(long)]
        lost_at: Option<u64>,
        /// Where the signed report is written; recovery-TIME.json if not given.
        #[arg(long)]
        report: Option<PathBuf>,
    },
    /// Checks a report offline and prints what it says.
    Verify {
        file: PathBuf,
        /// The region's certificate authority.
        #[arg(long, default_value = "ca.pem")]
        ca: PathBuf,
    },
}

#[derive(Subcommand)]
pub enum RestoreCommand {
    /// Restores the region onto empty nodes.
    Region {
        /// When the region was lost, in seconds since 1970, for the actual RPO; now if not given.
        #[arg(long)]
        lost_at: Option<u64>,
        /// The moment that all tenants are restored to, such as 2026-11-22T10:00:00Z; the newest
        /// state if not given. The directory is always restored to its newest state.
        #[arg(long, value_parser = moment)]
        at: Option<u64>,
    },
    /// Takes a tenant of a region that serves back to an earlier moment: exactly, with nothing of
    /// what came after. In place, or as a new tenant beside it, under a key of its own.
    #[command(group = clap::ArgGroup::new("point").required(true).multiple(true).args(["at", "revision", "new"]))]
    Tenant {
        name: String,
        /// The state after the last write at or before this moment, such as 2026-11-22T10:00:00Z.
        #[arg(long, value_parser = moment)]
        at: Option<u64>,
        /// The state at this revision.
        #[arg(long, conflicts_with = "at")]
        revision: Option<i64>,
        /// The name of a new tenant, which has tier, users and roles of this one; as it is now if no
        /// moment is given. This one is not touched.
        #[arg(long = "as", requires = "key")]
        new: Option<String>,
        /// The new tenant's key: local:NAME or arn:aws:kms:REGION:ACCOUNT:key/ID.
        #[arg(long, requires = "new")]
        key: Option<String>,
    },
}

/// Milliseconds since 1970 of a moment in RFC 3339.
pub fn moment(text: &str) -> Result<u64, String> {
    let refuse = |why: String| {
        format!("\"{text}\" is not a moment ({why}); write it as 2026-11-22T10:00:00Z")
    };
    let at = OffsetDateTime::parse(text, &Rfc3339).map_err(|e| refuse(e.to_string()))?;
    u64::try_from(at.unix_timestamp_nanos() / 1_000_000).map_err(|_| refuse("before 1970".into()))
}

/// Milliseconds of `250ms`, `1s`, `15m`, `24h` or `7d`.
pub fn milliseconds(text: &str) -> Result<u64, String> {
    let at = text
        .find(|c: char| !c.is_ascii_digit())
        .unwrap_or(text.len());
    let (number, unit) = text.split_at(at);
    let unit = match unit {
        "ms" => 1,
        "s" => 1_000,
        "m" => 60_000,
        "h" => 3_600_000,
        "d" => 86_400_000,
        _ => {
            return Err(format!(
                "\"{text}\" is not a duration; use a number and ms, s, m, h or d"
            ));
        }
    };
    let number: u64 = number
        .parse()
        .map_err(|_| format!("\"{text}\" is not a duration"))?;
    number
        .checked_mul(unit)
        .ok_or_else(|| format!("\"{text}\" is too long"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn moments() {
        assert_eq!(moment("1970-01-01T00:00:01.5Z"), Ok(1500));
        assert_eq!(moment("1970-01-01T02:00:00+02:00"), Ok(0));
        for bad in ["", "10:00", "2026-11-22", "1969-12-31T23:59:59Z"] {
            assert!(moment(bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn durations() {
        assert_eq!(milliseconds("1s"), Ok(1000));
        assert_eq!(milliseconds("15m"), Ok(900_000));
        for bad in ["", "s", "1", "1y", "-1s", "99999999999999999999d"] {
            assert!(milliseconds(bad).is_err(), "{bad}");
        }
    }
}
