//! The ports of a node: clients, and operators with metrics and health beside them.

pub mod metrics;
mod tls;

use std::sync::Arc;

use axum::routing::get;
use replication::network::NodeTls;
use tonic::transport::Server;

use crate::node::{Node, NodeState, bind};
use crate::{admin, gateway, limits};

fn builder() -> Server {
    Server::builder()
        .initial_stream_window_size(limits::STREAM_WINDOW)
        .initial_connection_window_size(limits::CONNECTION_WINDOW)
        .max_concurrent_streams(limits::MAX_STREAMS)
        .http2_keepalive_interval(Some(std::time::Duration::from_secs(30)))
}

/// Binds both ports and serves them in the background.
pub async fn start(node: &Arc<Node>) -> Result<(), String> {
    let listener = bind(node.config.client_address).await?;
    let routes = gateway::routes(node);
    let acceptor = match &node.config.client_tls {
        Some(files) => Some(tls::client_acceptor(files)?),
        None => None,
    };
    node.spawn(async move {
        let served = match acceptor {
            Some(acceptor) => {
                builder()
                    .add_routes(routes)
                    .serve_with_incoming(tls::incoming(listener, acceptor))
                    .await
            }
            None => {
                let incoming = tokio_stream::wrappers::TcpListenerStream::new(listener);
                let incoming = futures::StreamExt::map(incoming, |tcp| {
                    tcp.inspect(|tcp| drop(tcp.set_nodelay(true)))
                });
                builder()
                    .add_routes(routes)
                    .serve_with_incoming(incoming)
                    .await
            }
        };
        if let Err(e) = served {
            tracing::error!(error = %e, "the client port has stopped");
        }
    });

    let files = &node.config.tls;
    let admin_tls = NodeTls::load(&files.ca, &files.cert, &files.key, &[b"h2", b"http/1.1"])
        .map_err(|e| e.to_string())?;
    let listener = bind(node.config.admin_address).await?;
    let (health, ready, figures) = (node.clone(), node.clone(), node.clone());
    let routes = admin::routes(node)
        .into_axum_router()
        .route("/healthz", get(move || async move { healthz(&health) }))
        .route("/readyz", get(move || async move { readyz(&ready) }))
        .route(
            "/metrics",
            get(move || async move { metrics::text(&figures) }),
        );
    let routes = tonic::service::Routes::from(routes).prepare();
    let acceptor = tokio_rustls::TlsAcceptor::from(admin_tls.server);
    node.spawn(async move {
        let incoming = tls::incoming(listener, acceptor);
        if let Err(e) = builder()
            .accept_http1(true)
            .add_routes(routes)
            .serve_with_incoming(incoming)
            .await
        {
            tracing::error!(error = %e, "the admin port has stopped");
        }
    });
    Ok(())
}

fn healthz(node: &Node) -> String {
    let away = node.unreachable();
    match away.is_empty() {
        true => format!("ok: {}\n", node.state.read().name()),
        false => format!(
            "degraded: {}; no connection to {}\n",
            node.state.read().name(),
            away.join(", ")
        ),
    }
}

fn readyz(node: &Node) -> (axum::http::StatusCode, String) {
    let state = *node.state.read();
    let code = match state {
        NodeState::Serving => axum::http::StatusCode::OK,
        _ => axum::http::StatusCode::SERVICE_UNAVAILABLE,
    };
    (code, format!("{}\n", state.name()))
}
