//! `holdfast drill`.

use std::path::Path;
use std::process::ExitCode;

use daemon::admin_client::OperatorConfig;
use daemon::drill::{Evidence, page};
use daemon::proto::admin::{ListDrillsRequest, RunDrillRequest, Statement};
use daemon::signed::Signed;
use replication::clock::utc;

use crate::args::DrillCommand;
use crate::tenant::said;
use crate::{residency, restore, table};

pub async fn run(config: &Path, command: DrillCommand) -> Result<ExitCode, String> {
    match command {
        DrillCommand::Run { tenant } => {
            let operator = OperatorConfig::load(config)?;
            let mut client = restore::holding(&operator, &tenant).await?;
            let request = RunDrillRequest { name: tenant };
            let screen = restore::show(client.run_drill(request).await).await?;
            let json = screen.said.ok_or("the node broke off; its log says why")?;
            let (_, evidence) = read(&Statement { json })?;
            Ok(tell(&evidence))
        }
        DrillCommand::Ls { tenant } => {
            let listed = list(config, tenant).await?;
            let rows: Result<Vec<_>, String> = listed
                .iter()
                .map(|statement| Ok(row(&read(statement)?.1)))
                .collect();
            table::print(
                &[
                    "ENDED", "RESULT", "REVISION", "RPO", "RTO", "OF RTO", "NODE",
                ],
                &rows?,
            );
            Ok(ExitCode::SUCCESS)
        }
        DrillCommand::Show { tenant, html } => {
            let listed = list(config, tenant.clone()).await?;
            let newest = listed.last();
            let newest = newest.ok_or_else(|| format!("no drill of {tenant} was run yet"))?;
            match html {
                true => println!("{}", page(&read(newest)?.0)?),
                false => println!("{}", newest.json),
            }
            Ok(ExitCode::SUCCESS)
        }
        DrillCommand::Verify { file, ca } => residency::check(&file, &ca),
    }
}

async fn list(config: &Path, name: String) -> Result<Vec<Statement>, String> {
    let mut client = OperatorConfig::load(config)?.connect().await?;
    let listed = client.list_drills(ListDrillsRequest { name }).await;
    Ok(listed.map_err(said)?.into_inner().statements)
}

fn read(statement: &Statement) -> Result<(Signed, Evidence), String> {
    let signed: Signed = serde_json::from_str(&statement.json).map_err(|e| e.to_string())?;
    let evidence = serde_json::from_str(&signed.body).map_err(|e| e.to_string())?;
    Ok((signed, evidence))
}

fn row(e: &Evidence) -> Vec<String> {
    let result = match e.passed {
        true => "passed".to_string(),
        false => format!("FAILED: {}", e.problem),
    };
    vec![
        utc(e.at_ms),
        result,
        e.revision.to_string(),
        table::duration(e.rpo_ms),
        table::duration(e.rto_ms),
        table::duration(e.rto_contract_ms),
        e.node.clone(),
    ]
}

fn tell(e: &Evidence) -> ExitCode {
    println!();
    if !e.passed {
        println!(
            "The drill of {} FAILED: {}\n{}",
            e.tenant, e.problem, e.advice
        );
        return ExitCode::FAILURE;
    }
    println!(
        "The drill of {} passed: revision {} was restored on {} and verified in {} ({} contracted); the archive was {} behind ({} contracted); digest {}, {} sampled keys as the live tenant has them.",
        e.tenant,
        e.revision,
        e.node,
        table::duration(e.rto_ms),
        table::duration(e.rto_contract_ms),
        table::duration(e.rpo_ms),
        table::duration(e.rpo_contract_ms),
        e.digest,
        e.sample.keys - e.sample.not_comparable,
    );
    println!(
        "'holdfast drill show {}' prints its signed evidence.",
        e.tenant
    );
    ExitCode::SUCCESS
}
