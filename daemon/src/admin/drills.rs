//! What operators ask of drills.

use std::sync::Arc;

use futures::TryStreamExt;
use object_store::{ObjectStore, ObjectStoreExt};
use tokio::sync::mpsc;
use tonic::Status;
use tonic::codegen::BoxStream;

use super::AdminService;
use crate::drill;
use crate::limits;
use crate::proto::admin::{RestoreEvent, Statement, StatementList};

impl AdminService {
    /// Runs a drill; it goes on if the operator's connection is lost, and leaves its evidence.
    pub(super) fn drill(&self, name: &str) -> Result<BoxStream<RestoreEvent>, Status> {
        let record = self.found(name)?.record();
        let (events, stream) = mpsc::channel(256);
        let (node, name) = (self.0.clone(), name.to_string());
        tokio::spawn(async move {
            let (telling, tenant) = (events.clone(), name.clone());
            let told = Arc::new(move |phase: &str, done: u64, total: u64| {
                let event = RestoreEvent {
                    tenant: tenant.clone(),
                    phase: phase.into(),
                    done,
                    total,
                    ..RestoreEvent::default()
                };
                // A slow terminal does not slow the drill.
                let _ = telling.try_send(Ok(event));
            });
            let signed = drill::run(&node, &record, told).await;
            let json = signed.and_then(|s| serde_json::to_string(&s).map_err(|e| e.to_string()));
            let last = match json {
                Ok(message) => Ok(RestoreEvent {
                    tenant: name,
                    phase: "drilled".into(),
                    message,
                    ..RestoreEvent::default()
                }),
                Err(why) => Err(Status::failed_precondition(why)),
            };
            let _ = events.send(last).await;
        });
        let stream = tokio_stream::wrappers::ReceiverStream::new(stream);
        Ok(Box::pin(stream))
    }

    /// The evidence in the bucket.
    pub(super) async fn drills(&self, name: &str) -> Result<StatementList, Status> {
        let record = self.found(name)?.record();
        let bucket = &self.0.parts.bucket;
        let away = |e: object_store::Error| Status::unavailable(format!("the bucket: {e}"));
        let dir = drill::evidence_dir(record.id);
        let found: Vec<_> = bucket.list(Some(&dir)).try_collect().await.map_err(away)?;
        let mut objects: Vec<_> = found.into_iter().map(|meta| meta.location).collect();
        objects.retain(|object| object.extension() == Some("json"));
        objects.sort();
        let mut statements = Vec::new();
        for object in objects.iter().rev().take(limits::MAX_DRILLS).rev() {
            let bytes = bucket.get(object).await.map_err(away)?.bytes().await;
            let json = String::from_utf8_lossy(&bytes.map_err(away)?).into_owned();
            statements.push(Statement { json });
        }
        Ok(StatementList { statements })
    }
}
