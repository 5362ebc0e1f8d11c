//! `holdfast objectives`.

use std::path::Path;
use std::process::ExitCode;

use daemon::admin_client::OperatorConfig;
use daemon::proto::admin::{
    ListObjectivesRequest, Objective, ObjectiveHistoryRequest, ObjectiveHour,
};
use replication::clock::utc;

use crate::table;
use crate::tenant::said;

/// Fails if an objective is missed, or not known to be met.
pub async fn run(config: &Path, json: bool) -> Result<ExitCode, String> {
    let mut client = OperatorConfig::load(config)?.connect().await?;
    let listed = client.list_objectives(ListObjectivesRequest {}).await;
    let objectives = listed.map_err(said)?.into_inner().objectives;
    if json {
        let rows: Vec<_> = objectives.iter().map(value).collect();
        let text = serde_json::to_string_pretty(&rows).map_err(|e| e.to_string())?;
        println!("{text}");
    } else {
        let rows: Vec<_> = objectives.iter().map(row).collect();
        table::print(
            &[
                "TENANT",
                "TIER",
                "STATE",
                "RPO NOW",
                "RPO",
                "RTO ESTIMATED",
                "RTO",
                "LAST DRILL",
                "PROBLEM",
            ],
            &rows,
        );
    }
    let met = |o: &Objective| matches!(o.state.as_str(), "met" | "near") && o.problem.is_empty();
    Ok(match objectives.iter().all(met) {
        true => ExitCode::SUCCESS,
        false => ExitCode::FAILURE,
    })
}

/// Prints the worst of each hour.
pub async fn history(config: &Path, name: String, json: bool) -> Result<ExitCode, String> {
    let mut client = OperatorConfig::load(config)?.connect().await?;
    let request = ObjectiveHistoryRequest { name };
    let found = client.objective_history(request).await.map_err(said)?;
    let hours = found.into_inner().hours;
    if json {
        let rows: Vec<_> = hours.iter().map(hour).collect();
        let text = serde_json::to_string_pretty(&rows).map_err(|e| e.to_string())?;
        println!("{text}");
        return Ok(ExitCode::SUCCESS);
    }
    let estimated = |h: &ObjectiveHour| match h.rto_ms {
        0 => "not yet".into(),
        ms => table::duration(ms),
    };
    let rows = hours.iter().map(|h| {
        vec![
            utc(h.at_ms),
            h.state.clone(),
            table::duration(h.rpo_ms),
            table::duration(h.rpo_contract_ms),
            estimated(h),
            table::duration(h.rto_contract_ms),
        ]
    });
    table::print(
        &[
            "HOUR FROM",
            "STATE",
            "WORST RPO",
            "RPO",
            "WORST RTO ESTIMATED",
            "RTO",
        ],
        &rows.collect::<Vec<_>>(),
    );
    Ok(ExitCode::SUCCESS)
}

fn hour(h: &ObjectiveHour) -> serde_json::Value {
    serde_json::json!({
        "at_ms": h.at_ms,
        "state": h.state,
        "rpo_ms": h.rpo_ms,
        "rpo_contract_ms": h.rpo_contract_ms,
        "rto_ms": h.rto_ms,
        "rto_contract_ms": h.rto_contract_ms,
    })
}

fn drill(o: &Objective) -> String {
    match o.drill_ms {
        0 => "none yet".into(),
        at => utc(at),
    }
}

fn row(o: &Objective) -> Vec<String> {
    vec![
        o.tenant.clone(),
        o.tier.clone(),
        o.state.clone(),
        table::duration(o.actual_rpo_ms),
        table::duration(o.rpo_ms),
        table::duration(o.estimated_rto_ms),
        table::duration(o.rto_ms),
        drill(o),
        o.problem.clone(),
    ]
}

fn value(o: &Objective) -> serde_json::Value {
    serde_json::json!({
        "tenant": o.tenant,
        "tier": o.tier,
        "state": o.state,
        "rpo_ms": o.rpo_ms,
        "actual_rpo_ms": o.actual_rpo_ms,
        "rto_ms": o.rto_ms,
        "estimated_rto_ms": o.estimated_rto_ms,
        "drill_ms": o.drill_ms,
        "checkpoint_bytes": o.checkpoint_bytes,
        "log_bytes": o.log_bytes,
        "problem": o.problem,
    })
}
