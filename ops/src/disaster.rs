//! `holdfast disaster`.

use std::path::Path;
use std::process::ExitCode;

use daemon::admin::restore::{Recovered, Report};
use daemon::admin_client::OperatorConfig;
use daemon::proto::admin::{NodeStatusRequest, RestoreRegionRequest};
use daemon::signed::Signed;

use crate::args::DisasterCommand;
use crate::tenant::said;
use crate::{residency, restore, table};

pub async fn run(config: &Path, command: DisasterCommand) -> Result<ExitCode, String> {
    let (region, lost_at, file) = match command {
        DisasterCommand::Verify { file, ca } => return residency::check(&file, &ca),
        DisasterCommand::Declare {
            region,
            lost_at,
            report,
        } => (region.to_string(), lost_at, report),
    };
    let mut client = restore::awaiting(&OperatorConfig::load(config)?).await?;
    let status = client.node_status(NodeStatusRequest {}).await;
    let status = status.map_err(said)?.into_inner();
    if status.region != region {
        return Err(format!(
            "node {} is of region {}, not of {region}: nothing was done",
            status.name, status.region
        ));
    }
    let request = RestoreRegionRequest {
        lost_at_ms: lost_at.map_or(0, |seconds| seconds * 1000),
        at_ms: 0,
    };
    let mut screen = restore::show(client.restore_region(request).await).await?;
    let report = screen.report.take();
    let mut ended = screen.finish()?;
    let Some(json) = report else {
        return Ok(ended);
    };
    let signed: Signed = serde_json::from_str(&json).map_err(|e| e.to_string())?;
    let report: Report = serde_json::from_str(&signed.body).map_err(|e| e.to_string())?;
    let file = file.unwrap_or_else(|| format!("recovery-{}.json", report.at_ms).into());
    std::fs::write(&file, &json).map_err(|e| format!("{}: {e}", file.display()))?;
    let missed: Vec<String> = report.tenants.iter().filter_map(missed).collect();
    let restored = report.tenants.iter().filter(|t| t.refused.is_empty());
    let quiet = restored.filter(|t| t.rpo_ms > t.rpo_contract_ms);
    let quiet: Vec<&str> = quiet.map(|t| t.tenant.as_str()).collect();
    println!();
    match missed.is_empty() {
        true => println!("Every RTO is met."),
        false => {
            println!("NOT met:\n{}", missed.join("\n"));
            ended = ExitCode::FAILURE;
        }
    }
    match quiet.is_empty() {
        true => {
            println!("Of what is restored every RPO is met: the newest write is younger than it.")
        }
        // Nothing says whether something was written since.
        false => println!(
            "The newest restored write is older than the RPO, so that only its clients can say whether one is missing, of: {}",
            quiet.join(", ")
        ),
    }
    println!(
        "The signed report is {}; 'holdfast disaster verify' checks it.",
        file.display()
    );
    Ok(ended)
}

/// What of a tenant's contract is not met; none if all is.
fn missed(t: &Recovered) -> Option<String> {
    if !t.refused.is_empty() {
        return Some(format!("{}: not restored: {}", t.tenant, t.refused));
    }
    let late = |what: &str, is: u64, contracted: u64| {
        let (is, contracted) = (table::duration(is), table::duration(contracted));
        format!("{}: {what} {is}, {contracted} contracted", t.tenant)
    };
    (t.rto_ms > t.rto_contract_ms).then(|| late("RTO", t.rto_ms, t.rto_contract_ms))
}
