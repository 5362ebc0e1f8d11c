//! `holdfast tenant` and `holdfast node`.

use std::path::Path;
use std::process::ExitCode;

use daemon::admin_client::OperatorConfig;
use daemon::proto::admin::{
    CreateTenantRequest, DeleteTenantRequest, KeyReport, ListTenantsRequest, NodeStatusRequest,
    SetTenantRequest, ShowTenantRequest, Tenant, UndeleteTenantRequest,
};
use replication::clock::utc;

use crate::args::{Create, TenantCommand, milliseconds};
use crate::table;

pub fn said(e: tonic::Status) -> String {
    e.message().to_string()
}

pub async fn run(config: &Path, command: TenantCommand) -> Result<ExitCode, String> {
    let mut client = OperatorConfig::load(config)?.connect().await?;
    match command {
        TenantCommand::Create(create) => {
            let tenant = client
                .create_tenant(request(create)?)
                .await
                .map_err(said)?
                .into_inner();
            println!("Tenant {} is ready: {}", tenant.name, tenant.id);
        }
        TenantCommand::List => {
            let list = client
                .list_tenants(ListTenantsRequest {})
                .await
                .map_err(said)?
                .into_inner();
            let row = |t: &Tenant| {
                let state = if t.problem.is_empty() {
                    "serving"
                } else {
                    &t.problem
                };
                vec![
                    t.name.clone(),
                    t.tier.clone(),
                    table::duration(t.rpo_ms),
                    table::duration(t.actual_rpo_ms),
                    table::duration(t.rto_ms),
                    t.revision.to_string(),
                    state.to_string(),
                ]
            };
            let rows: Vec<_> = list.tenants.iter().map(row).collect();
            table::print(
                &[
                    "TENANT", "TIER", "RPO", "RPO NOW", "RTO", "REVISION", "STATE",
                ],
                &rows,
            );
        }
        TenantCommand::Show { name } => {
            let tenant = client
                .show_tenant(ShowTenantRequest { name })
                .await
                .map_err(said)?
                .into_inner();
            show(&tenant);
        }
        TenantCommand::Delete { name, grace } => {
            let request = DeleteTenantRequest {
                name: name.clone(),
                grace_s: Some(seconds(&grace)?),
            };
            let answer = client.delete_tenant(request).await.map_err(said)?;
            let answer = answer.into_inner();
            match answer.certificate.is_empty() {
                true => println!(
                    "Tenant {name} is deleted. It is destroyed at {}; until then 'holdfast tenant undelete {name}' brings it back.",
                    utc(answer.due_ms)
                ),
                false => println!("{}", answer.certificate),
            }
        }
        TenantCommand::Undelete { name } => {
            let request = UndeleteTenantRequest { name };
            let tenant = client.undelete_tenant(request).await.map_err(said)?;
            show(&tenant.into_inner());
        }
        TenantCommand::Set(set) => {
            let request = SetTenantRequest {
                name: set.name,
                key_grace_s: set.key_grace.as_deref().map(seconds).transpose()?,
                rotate_days: set.rotate_days,
                drill_every_s: set.drill_every.as_deref().map(seconds).transpose()?,
                max_unarchived_ms: set
                    .max_unarchived
                    .as_deref()
                    .map(milliseconds)
                    .transpose()?,
                keep_ms: set.keep.as_deref().map(milliseconds).transpose()?,
                keep_checkpoints: set.keep_checkpoints,
            };
            show(&client.set_tenant(request).await.map_err(said)?.into_inner());
        }
    }
    Ok(ExitCode::SUCCESS)
}

/// Whole seconds of a duration.
fn seconds(text: &str) -> Result<u64, String> {
    Ok(milliseconds(text)?.div_ceil(1000))
}

fn request(create: Create) -> Result<CreateTenantRequest, String> {
    let password = match create.password {
        Some(password) => password,
        None => {
            let mut line = String::new();
            eprint!("Password of {}: ", create.user);
            std::io::stdin()
                .read_line(&mut line)
                .map_err(|e| e.to_string())?;
            line.trim_end_matches('\n').to_string()
        }
    };
    let parse = |text: Option<String>| text.map_or(Ok(0), |text| milliseconds(&text));
    Ok(CreateTenantRequest {
        name: create.name,
        tier: create.tier,
        rpo_ms: create.rpo.as_deref().map(milliseconds).transpose()?,
        rto_ms: parse(create.rto)?,
        key: create.key,
        user: create.user,
        password,
        quota_bytes: create.quota.unwrap_or(0),
        key_grace_s: create.key_grace.as_deref().map(seconds).transpose()?,
    })
}

pub fn show(t: &Tenant) {
    let archived = if t.archived >= t.applied {
        "everything".into()
    } else {
        format!("index {} of {}", t.archived, t.applied)
    };
    let rows = [
        ("tenant", t.name.clone()),
        ("id", format!("{}, incarnation {}", t.id, t.incarnation)),
        ("tier", t.tier.clone()),
        ("key", format!("{}, {}", t.key, generations(t))),
        ("key task", t.key_task.clone()),
        (
            "key grace",
            table::duration(t.key_grace_s.saturating_mul(1000)),
        ),
        (
            "replicas",
            format!("{} (leader {})", t.voters.join(", "), t.leader),
        ),
        ("revision", t.revision.to_string()),
        ("bytes", t.bytes.to_string()),
        ("digest", t.digest.clone()),
        ("archived", archived),
        (
            "RPO",
            format!(
                "{} contracted, {} now (seen from {})",
                table::duration(t.rpo_ms),
                table::duration(t.actual_rpo_ms),
                t.node
            ),
        ),
        ("RTO", format!("{} contracted", table::duration(t.rto_ms))),
        ("coverage", t.coverage.clone()),
        ("problem", t.problem.clone()),
    ];
    for (what, value) in rows.iter().filter(|(_, value)| !value.is_empty()) {
        println!("{what:<10}{value}");
    }
    for report in &t.key_reports {
        println!("key on {}: {}", report.node, standing(report));
    }
    if let Some(ms) = sealed_within(t) {
        println!(
            "sealed on all nodes {} after the KMS first refused",
            table::duration(ms)
        );
    }
}

fn generations(t: &Tenant) -> String {
    match t.other_generations.len() {
        0 => format!("generation {}", t.generation),
        _ => format!(
            "generation {} (and still needed: {})",
            t.generation,
            t.other_generations
                .iter()
                .map(u32::to_string)
                .collect::<Vec<_>>()
                .join(", ")
        ),
    }
}

fn standing(report: &KeyReport) -> String {
    let age = table::duration(report.proof_age_ms);
    let mut text = match report.sealed.as_str() {
        "" => format!("proven {age} ago"),
        why => format!("sealed: {why}"),
    };
    if !report.unproven.is_empty() {
        text.push_str(&format!("; now {}", report.unproven));
    }
    if report.older_bytes + report.older_entries > 0 {
        text.push_str(&format!(
            "; {} of {} bytes and {} log entries are under older generations",
            report.older_bytes, report.of_bytes, report.older_entries
        ));
    }
    if report.resumed_ms > report.sealed_ms {
        let sealed = report.resumed_ms - report.sealed_ms;
        text.push_str(&format!("; was sealed for {}", table::duration(sealed)));
    }
    text
}

/// From the first refusal that a node saw to the last node's sealing, if all are sealed.
fn sealed_within(tenant: &Tenant) -> Option<u64> {
    let reports = &tenant.key_reports;
    let sealed = |r: &KeyReport| !r.sealed.is_empty() && r.refused_ms > r.resumed_ms;
    if reports.len() < tenant.placement.len() || !reports.iter().all(sealed) {
        return None;
    }
    let first = reports.iter().map(|r| r.refused_ms).min()?;
    let last = reports.iter().map(|r| r.sealed_ms).max()?;
    Some(last.saturating_sub(first))
}

pub async fn node(config: &Path) -> Result<ExitCode, String> {
    let operator = OperatorConfig::load(config)?;
    let mut rows = Vec::new();
    let mut serving = true;
    for endpoint in &operator.endpoints {
        let row = match operator.connect_to(*endpoint).await {
            Ok(mut client) => {
                let s = client
                    .node_status(NodeStatusRequest {})
                    .await
                    .map_err(said)?
                    .into_inner();
                serving &= s.state == "serving";
                vec![endpoint.to_string(), s.name, s.region, s.zone, s.state]
            }
            Err(why) => {
                serving = false;
                vec![
                    endpoint.to_string(),
                    String::new(),
                    String::new(),
                    String::new(),
                    why,
                ]
            }
        };
        rows.push(row);
    }
    table::print(&["ADMIN", "NODE", "REGION", "ZONE", "STATE"], &rows);
    Ok(if serving {
        ExitCode::SUCCESS
    } else {
        ExitCode::FAILURE
    })
}
