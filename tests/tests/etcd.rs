//! Beside real etcd: the same random requests, the same answers; and etcdctl, unchanged.

use anyhow::{Result, ensure};
use daemon::proto::etcd::kv_client::KvClient;
use holdfast_tests::region::{PASSWORD, Region};
use holdfast_tests::servers;
use prost::Message;
use rand::rngs::StdRng;
use rand::{Rng, SeedableRng};
use replication::proto::etcdserverpb::compare::{CompareTarget, TargetUnion};
use replication::proto::etcdserverpb::request_op::Request as TxnOp;
use replication::proto::etcdserverpb::response_op::Response as TxnResult;
use replication::proto::etcdserverpb::{
    CompactionRequest, Compare, DeleteRangeRequest, PutRequest, RangeRequest, RequestOp,
    ResponseHeader, TxnRequest, TxnResponse,
};
use tonic::Status;
use tonic::transport::Channel;

const REQUESTS: usize = 6000;

enum Ask {
    Range(RangeRequest),
    Put(PutRequest),
    Delete(DeleteRangeRequest),
    Txn(TxnRequest),
    Compact(CompactionRequest),
}

fn key(rng: &mut StdRng) -> Vec<u8> {
    match rng.random_range(0..20) {
        0 => vec![],
        1 => vec![0],
        2 => vec![b'a', 0],
        _ => format!("k{}", rng.random_range(0..12)).into_bytes(),
    }
}

fn end(rng: &mut StdRng) -> Vec<u8> {
    match rng.random_range(0..6) {
        0 => vec![0],
        1 => key(rng),
        2 => b"k5".to_vec(),
        _ => vec![],
    }
}

fn range(rng: &mut StdRng, revision: i64) -> RangeRequest {
    RangeRequest {
        key: key(rng).into(),
        range_end: end(rng).into(),
        limit: if rng.random_bool(0.3) {
            rng.random_range(-1..5)
        } else {
            0
        },
        revision: if rng.random_bool(0.3) {
            rng.random_range(-1..revision + 3)
        } else {
            0
        },
        sort_order: rng.random_range(0..4),
        sort_target: rng.random_range(0..6),
        serializable: rng.random_bool(0.3),
        keys_only: rng.random_bool(0.1),
        count_only: rng.random_bool(0.1),
        min_mod_revision: if rng.random_bool(0.1) {
            rng.random_range(0..revision + 1)
        } else {
            0
        },
        max_create_revision: if rng.random_bool(0.1) {
            rng.random_range(0..revision + 1)
        } else {
            0
        },
        ..RangeRequest::default()
    }
}

fn put(rng: &mut StdRng) -> PutRequest {
    PutRequest {
        key: key(rng).into(),
        value: if rng.random_bool(0.8) {
            format!("v{}", rng.random_range(0..9)).into_bytes().into()
        } else {
            vec![].into()
        },
        lease: if rng.random_bool(0.03) { 77 } else { 0 },
        prev_kv: rng.random_bool(0.3),
        ignore_value: rng.random_bool(0.1),
        ignore_lease: rng.random_bool(0.1),
    }
}

fn delete(rng: &mut StdRng) -> DeleteRangeRequest {
    DeleteRangeRequest {
        key: key(rng).into(),
        // An inverted range inside a txn is treated oddly by etcd's interval tree.
        range_end: if rng.random_bool(0.2) {
            b"z".to_vec().into()
        } else {
            vec![].into()
        },
        prev_kv: rng.random_bool(0.3),
    }
}

fn txn(rng: &mut StdRng, revision: i64, depth: usize) -> TxnRequest {
    let compare = |rng: &mut StdRng| {
        let target = rng.random_range(0..5);
        let number = rng.random_range(0..4);
        let union = match CompareTarget::try_from(target).unwrap_or(CompareTarget::Version) {
            CompareTarget::Version => TargetUnion::Version(number),
            CompareTarget::Create => TargetUnion::CreateRevision(number * 5),
            CompareTarget::Mod => TargetUnion::ModRevision(revision - number),
            CompareTarget::Value => TargetUnion::Value(format!("v{number}").into_bytes().into()),
            CompareTarget::Lease => TargetUnion::Lease(0),
        };
        Compare {
            result: rng.random_range(0..4),
            target,
            key: key(rng).into(),
            range_end: if rng.random_bool(0.2) {
                end(rng).into()
            } else {
                vec![].into()
            },
            target_union: Some(union),
        }
    };
    let op = |rng: &mut StdRng| {
        let request = match rng.random_range(0..10) {
            0..4 => TxnOp::RequestPut(put(rng)),
            4..6 => TxnOp::RequestDeleteRange(delete(rng)),
            6 if depth < 2 => TxnOp::RequestTxn(txn(rng, revision, depth + 1)),
            _ => TxnOp::RequestRange(range(rng, revision)),
        };
        RequestOp {
            request: Some(request),
        }
    };
    let compares = rng.random_range(0..3);
    let (then, otherwise) = (rng.random_range(0..4), rng.random_range(0..3));
    TxnRequest {
        compare: (0..compares).map(|_| compare(rng)).collect(),
        success: (0..then).map(|_| op(rng)).collect(),
        failure: (0..otherwise).map(|_| op(rng)).collect(),
    }
}

fn ask(rng: &mut StdRng, revision: i64) -> Ask {
    match rng.random_range(0..100) {
        0..35 => Ask::Put(put(rng)),
        35..60 => Ask::Range(range(rng, revision)),
        60..70 => Ask::Delete(DeleteRangeRequest {
            range_end: end(rng).into(),
            ..delete(rng)
        }),
        70..99 => Ask::Txn(txn(rng, revision, 0)),
        _ => Ask::Compact(CompactionRequest {
            revision: rng.random_range(-1..revision + 2),
            physical: false,
        }),
    }
}

/// Headers differ in ids and term; the revision stays.
fn strip(header: &mut Option<ResponseHeader>) -> i64 {
    let revision = header.as_ref().map_or(0, |h| h.revision);
    *header = Some(ResponseHeader {
        revision,
        ..ResponseHeader::default()
    });
    revision
}

fn strip_txn(response: &mut TxnResponse) -> i64 {
    for op in &mut response.responses {
        match &mut op.response {
            Some(TxnResult::ResponseRange(r)) => drop(strip(&mut r.header)),
            Some(TxnResult::ResponsePut(r)) => drop(strip(&mut r.header)),
            Some(TxnResult::ResponseDeleteRange(r)) => drop(strip(&mut r.header)),
            Some(TxnResult::ResponseTxn(r)) => drop(strip_txn(r)),
            None => {}
        }
    }
    strip(&mut response.header)
}

/// The answer without ids, as bytes to compare and text to show, and the revision.
async fn answer(client: &mut KvClient<Channel>, token: Option<&str>, ask: &Ask) -> (String, i64) {
    fn request<T>(message: T, token: Option<&str>) -> tonic::Request<T> {
        let mut request = tonic::Request::new(message);
        if let Some(token) = token {
            request
                .metadata_mut()
                .insert("token", token.parse().expect("a token is ASCII"));
        }
        request
    }
    macro_rules! go {
        ($call:ident, $message:expr, $strip:expr) => {
            client
                .$call(request($message.clone(), token))
                .await
                .map(|r| {
                    let mut r = r.into_inner();
                    let revision = $strip(&mut r);
                    (format!("{r:?} {:x?}", r.encode_to_vec()), revision)
                })
        };
    }
    let result: Result<(String, i64), Status> = match ask {
        Ask::Range(m) => go!(
            range,
            m,
            |r: &mut replication::proto::etcdserverpb::RangeResponse| strip(&mut r.header)
        ),
        Ask::Put(m) => go!(
            put,
            m,
            |r: &mut replication::proto::etcdserverpb::PutResponse| strip(&mut r.header)
        ),
        Ask::Delete(m) => go!(
            delete_range,
            m,
            |r: &mut replication::proto::etcdserverpb::DeleteRangeResponse| strip(&mut r.header)
        ),
        Ask::Txn(m) => go!(txn, m, strip_txn),
        Ask::Compact(m) => go!(
            compact,
            m,
            |r: &mut replication::proto::etcdserverpb::CompactionResponse| strip(&mut r.header)
        ),
    };
    match result {
        Ok(ok) => ok,
        Err(e) => (format!("{:?}: {}", e.code(), e.message()), 0),
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn random_requests_are_answered_as_etcd_answers_them() -> Result<()> {
    let etcd = servers::etcd().await?;
    let region = Region::started().await?;
    region.create_tenant("acme", "standard", 0, 0).await?;
    let leader = region.leader("acme").await?;
    let url = format!("http://{}", region.client_address(leader));
    let mut auth = daemon::proto::etcd::auth_client::AuthClient::connect(url.clone()).await?;
    let login = replication::proto::etcdserverpb::AuthenticateRequest {
        name: "app@acme".into(),
        password: PASSWORD.into(),
    };
    // The first user arrived after the group: log in once it is known.
    let token = auth.authenticate(login).await?.into_inner().token;
    let mut ours = KvClient::connect(url).await?;
    let mut theirs = KvClient::connect(etcd.endpoint.clone()).await?;
    let seed: u64 = std::env::var("SEED")
        .ok()
        .and_then(|s| s.parse().ok())
        .unwrap_or(1);
    let mut rng = StdRng::seed_from_u64(seed);
    let mut revision = 1;
    for n in 0..REQUESTS {
        let asked = ask(&mut rng, revision);
        let (theirs, at) = answer(&mut theirs, None, &asked).await;
        let (ours, _) = answer(&mut ours, Some(&token), &asked).await;
        revision = revision.max(at);
        let shown = match &asked {
            Ask::Range(m) => format!("{m:?}"),
            Ask::Put(m) => format!("{m:?}"),
            Ask::Delete(m) => format!("{m:?}"),
            Ask::Txn(m) => format!("{m:?}"),
            Ask::Compact(m) => format!("{m:?}"),
        };
        ensure!(
            ours == theirs,
            "seed {seed}, request {n}: {shown}\n  etcd: {theirs}\n  ours: {ours}"
        );
    }
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn etcdctl_works_unchanged() -> Result<()> {
    let region = Region::started().await?;
    region.create_tenant("acme", "standard", 0, 0).await?;
    let endpoints: Vec<String> = (0..3)
        .map(|n| region.client_address(n).to_string())
        .collect();
    let etcdctl = servers::tool("etcdctl")?;
    let run = |arguments: &[&str], input: &str| {
        use std::io::Write;
        let mut child = std::process::Command::new(&etcdctl)
            .args([
                "--endpoints",
                &endpoints.join(","),
                "--user",
                &format!("app@acme:{PASSWORD}"),
            ])
            .args(arguments)
            .stdin(std::process::Stdio::piped())
            .stdout(std::process::Stdio::piped())
            .stderr(std::process::Stdio::piped())
            .spawn()?;
        child.stdin.take().unwrap().write_all(input.as_bytes())?;
        let out = child.wait_with_output()?;
        let text = [out.stdout, out.stderr].concat();
        let text = String::from_utf8_lossy(&text).into_owned();
        ensure!(out.status.success(), "{arguments:?}: {text}");
        Ok(text)
    };
    ensure!(run(&["put", "a", "1"], "")?.contains("OK"));
    ensure!(run(&["get", "a"], "")? == "a\n1\n");
    let txn = run(&["txn"], "value(\"a\") = \"1\"\n\nput b 2\n\nput c 3\n\n")?;
    ensure!(txn.contains("SUCCESS"), "{txn}");
    ensure!(run(&["get", "b", "--print-value-only"], "")? == "2\n");
    ensure!(run(&["del", "a"], "")? == "1\n");
    ensure!(run(&["compaction", "3"], "")?.contains("compacted revision 3"));
    ensure!(run(&["endpoint", "status"], "")?.lines().count() == 3);
    let health = run(&["endpoint", "health"], "")?;
    ensure!(health.matches("is healthy").count() == 3, "{health}");
    ensure!(run(&["member", "list"], "")?.lines().count() == 3);
    ensure!(run(&["endpoint", "hashkv"], "")?.lines().count() == 3);
    // Another tenant's password, and none.
    let wrong = std::process::Command::new(&etcdctl)
        .args([
            "--endpoints",
            &endpoints[0],
            "--user",
            "app@acme:wrong",
            "get",
            "b",
        ])
        .output()?;
    ensure!(String::from_utf8_lossy(&wrong.stderr).contains("authentication failed"));
    let none = std::process::Command::new(&etcdctl)
        .args(["--endpoints", &endpoints[0], "get", "b"])
        .output()?;
    ensure!(!none.status.success() && none.stdout.is_empty());
    Ok(())
}
