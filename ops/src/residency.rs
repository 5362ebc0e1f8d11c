//! `holdfast residency`, and signed statements.

use std::path::Path;
use std::process::ExitCode;

use daemon::admin_client::OperatorConfig;
use daemon::proto::admin::{ResidencyRequest, ShowCertificateRequest};
use daemon::residency::Report;
use daemon::signed::{Signed, verify};
use replication::clock::utc;
use rustls::pki_types::CertificateDer;
use rustls::pki_types::pem::PemObject;

use crate::args::CertificateCommand;
use crate::table;
use crate::tenant::said;

/// Prints the report; fails if anything lies outside the jurisdiction, or did not say where it lies.
pub async fn run(config: &Path, tenant: String, json: bool) -> Result<ExitCode, String> {
    let mut client = OperatorConfig::load(config)?.connect().await?;
    let request = ResidencyRequest { name: tenant };
    let statement = client.residency(request).await.map_err(said)?.into_inner();
    let signed: Signed = serde_json::from_str(&statement.json).map_err(|e| e.to_string())?;
    let report: Report = serde_json::from_str(&signed.body).map_err(|e| e.to_string())?;
    if json {
        println!("{}", statement.json);
    } else {
        show(&report);
    }
    let inside = report.places.iter().all(|p| p.problem.is_empty());
    Ok(if inside {
        ExitCode::SUCCESS
    } else {
        ExitCode::FAILURE
    })
}

fn show(report: &Report) {
    println!(
        "{} ({}) is pinned to jurisdiction {}\n",
        report.tenant, report.id, report.jurisdiction
    );
    let rows: Vec<_> = report
        .places
        .iter()
        .map(|p| {
            let when = match p.at_ms {
                0 => "never".into(),
                at => utc(at),
            };
            vec![
                p.what.clone(),
                p.name.clone(),
                p.place.clone(),
                p.checked.clone(),
                when,
                p.problem.clone(),
            ]
        })
        .collect();
    table::print(
        &[
            "WHAT",
            "NAME",
            "PLACE",
            "CHECKED BY",
            "CHECKED AT",
            "PROBLEM",
        ],
        &rows,
    );
}

pub async fn certificate(config: &Path, command: CertificateCommand) -> Result<ExitCode, String> {
    match command {
        CertificateCommand::Show { tenant } => {
            let mut client = OperatorConfig::load(config)?.connect().await?;
            let request = ShowCertificateRequest { name: tenant };
            let shown = client.show_certificate(request).await.map_err(said)?;
            println!("{}", shown.into_inner().json);
            Ok(ExitCode::SUCCESS)
        }
        CertificateCommand::Verify { file, ca } => check(&file, &ca),
    }
}

pub fn check(file: &Path, ca: &Path) -> Result<ExitCode, String> {
    let at = |path: &Path, e: &dyn std::fmt::Display| format!("{}: {e}", path.display());
    let text = std::fs::read_to_string(file).map_err(|e| at(file, &e))?;
    let signed: Signed = serde_json::from_str(&text).map_err(|e| at(file, &e))?;
    let authority = CertificateDer::from_pem_file(ca).map_err(|e| at(ca, &e))?;
    let by = verify(&signed, &authority).map_err(|e| at(file, &e))?;
    let body: serde_json::Value = serde_json::from_str(&signed.body).map_err(|e| at(file, &e))?;
    let body = serde_json::to_string_pretty(&body).map_err(|e| e.to_string())?;
    println!(
        "valid: signed by {}, whose certificate is the authority's\n{body}",
        by.uri()
    );
    Ok(ExitCode::SUCCESS)
}
