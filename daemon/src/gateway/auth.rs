//! Login: `user@tenant` and a password give a token, which any node of the region can check.
//!
//! A token is `tenant name . user (hex) . auth revision . expiry . MAC`, the MAC under a secret of the
//! tenant. Passwords are kept as argon2id hashes. A token made before the tenant's users last
//! changed is refused, as etcd refuses it, and clients log in again.

use std::collections::HashMap;
use std::sync::Arc;
use std::time::{SystemTime, UNIX_EPOCH};

use argon2::Argon2;
use argon2::password_hash::{PasswordHash, PasswordHasher, PasswordVerifier, SaltString};
use hmac::{Hmac, KeyInit, Mac};
use parking_lot::RwLock;
use replication::group::Group;
use replication::proto::etcdserverpb::{
    AuthDisableRequest, AuthDisableResponse, AuthEnableRequest, AuthEnableResponse,
    AuthenticateRequest, AuthenticateResponse,
};
use sha2::Sha256;
use tokio::sync::Semaphore;
use tonic::metadata::MetadataMap;
use tonic::{Request, Response, Status};

use super::{Gateway, proposal};
use crate::limits;
use crate::proto::etcd::auth_server::Auth;
use crate::tenant::Tenant;

/// A login.
pub struct Session {
    pub tenant: Arc<Tenant>,
    pub user: String,
    pub auth_revision: u64,
    /// Seconds since 1970.
    expires: u64,
}

/// Logins that were checked, by token.
pub struct Sessions {
    known: RwLock<HashMap<String, Arc<Session>>>,
    logins: Semaphore,
}

impl Default for Sessions {
    fn default() -> Self {
        Sessions {
            known: RwLock::default(),
            logins: Semaphore::new(limits::MAX_LOGINS),
        }
    }
}

fn now() -> u64 {
    SystemTime::now()
        .duration_since(UNIX_EPOCH)
        .unwrap_or_default()
        .as_secs()
}

fn invalid_token() -> Status {
    Status::unauthenticated("etcdserver: invalid auth token")
}

fn wrong_login() -> Status {
    Status::invalid_argument("etcdserver: authentication failed, invalid user ID or password")
}

/// An argon2id hash in PHC form, with a random salt.
pub fn hash_password(password: &str) -> Result<String, String> {
    let salt =
        SaltString::encode_b64(&kms::secret::random_bytes::<16>()).map_err(|e| e.to_string())?;
    let hash = Argon2::default().hash_password(password.as_bytes(), &salt);
    hash.map(|h| h.to_string()).map_err(|e| e.to_string())
}

fn mac(group: &Group, text: &str) -> Result<Hmac<Sha256>, Status> {
    let keys = group.keys();
    let keys = keys.ok_or_else(|| Status::unavailable("etcdserver: no leader"))?;
    let key = keys.token_key();
    let mut mac =
        Hmac::<Sha256>::new_from_slice(key.expose()).expect("HMAC takes a key of any length");
    mac.update(text.as_bytes());
    Ok(mac)
}

fn make_token(group: &Group, session: &Session) -> Result<String, Status> {
    let name = session.tenant.record().name;
    let user = hex::encode(&session.user);
    let text = format!(
        "{name}.{user}.{}.{}",
        session.auth_revision, session.expires
    );
    let tag = hex::encode(mac(group, &text)?.finalize().into_bytes());
    Ok(format!("{text}.{tag}"))
}

impl Gateway {
    /// The login of a request: metadata `token`, else `authorization`, with or without `Bearer`.
    pub async fn session(&self, metadata: &MetadataMap) -> Result<Arc<Session>, Status> {
        let token = metadata
            .get("token")
            .or_else(|| metadata.get("authorization"));
        let Some(token) = token.and_then(|t| t.to_str().ok()) else {
            return Err(Status::invalid_argument("etcdserver: user name is empty"));
        };
        let token = token.strip_prefix("Bearer ").unwrap_or(token);
        let known = self.sessions.known.read().get(token).cloned();
        let session = match known {
            Some(session) => session,
            None => self.check_token(token).await?,
        };
        if session.expires <= now() {
            self.sessions.known.write().remove(token);
            return Err(invalid_token());
        }
        Ok(session)
    }

    fn tenant(&self, name: &str) -> Option<Arc<Tenant>> {
        self.node.tenants.get(name)
    }

    /// A tenant that this node does not know: only a node that is up to date may say that there is
    /// none.
    fn unknown_tenant(&self, none: Status) -> Status {
        match *self.node.state.read() {
            crate::node::NodeState::Serving => none,
            state => Status::unavailable(format!(
                "etcdserver: no leader (holdfast: this node is {})",
                state.name()
            )),
        }
    }

    async fn check_token(&self, token: &str) -> Result<Arc<Session>, Status> {
        let parts: Vec<&str> = token.split('.').collect();
        let [name, user, auth_revision, expires, tag] = parts[..] else {
            return Err(invalid_token());
        };
        let tenant = self
            .tenant(name)
            .ok_or_else(|| self.unknown_tenant(invalid_token()))?;
        let group = self.group_of(&tenant).await?;
        let text = &token[..token.len() - tag.len() - 1];
        let tag = hex::decode(tag).map_err(|_| invalid_token())?;
        mac(&group, text)?
            .verify_slice(&tag)
            .map_err(|_| invalid_token())?;
        let user = hex::decode(user)
            .ok()
            .and_then(|u| String::from_utf8(u).ok());
        let session = Arc::new(Session {
            user: user.ok_or_else(invalid_token)?,
            auth_revision: auth_revision.parse().map_err(|_| invalid_token())?,
            expires: expires.parse().map_err(|_| invalid_token())?,
            tenant,
        });
        self.remember(token.to_string(), session.clone());
        Ok(session)
    }

    fn remember(&self, token: String, session: Arc<Session>) {
        let mut known = self.sessions.known.write();
        if known.len() >= limits::MAX_SESSIONS {
            let now = now();
            known.retain(|_, s| s.expires > now);
            if known.len() >= limits::MAX_SESSIONS {
                known.clear();
            }
        }
        known.insert(token, session);
    }

    /// For reads, which apply does not check.
    pub fn check_session(&self, session: &Session, group: &Group) -> Result<(), Status> {
        if session.auth_revision == group.store().auth_revision() {
            return Ok(());
        }
        Err(Status::invalid_argument(
            "etcdserver: revision of auth store is old",
        ))
    }
}

pub struct AuthService(pub Arc<Gateway>);

#[tonic::async_trait]
impl Auth for AuthService {
    async fn authenticate(
        &self,
        request: Request<AuthenticateRequest>,
    ) -> Result<Response<AuthenticateResponse>, Status> {
        let request = request.into_inner();
        let Some((user, tenant)) = request.name.rsplit_once('@') else {
            return Err(Status::invalid_argument(
                "etcdserver: authentication failed, invalid user ID or password (holdfast: log in as user@tenant)",
            ));
        };
        let node = &self.0.node;
        let ours = node.config.region;
        let tenant = match tenant.rsplit_once('.') {
            Some((name, region)) => {
                if region != ours.name() {
                    return Err(Status::invalid_argument(format!(
                        "etcdserver: authentication failed, invalid user ID or password (holdfast: this is region {ours}; use the endpoints of region {region})"
                    )));
                }
                name
            }
            None => tenant,
        };
        let tenant = self
            .0
            .tenant(tenant)
            .ok_or_else(|| self.0.unknown_tenant(wrong_login()))?;
        let group = self.0.group_of(&tenant).await?;
        group.read_barrier().await.map_err(|e| proposal(&e))?;
        let _permit = self
            .0
            .sessions
            .logins
            .acquire()
            .await
            .map_err(|_| invalid_token())?;
        let auth_revision = group.store().auth_revision();
        let stored = group
            .store()
            .user(user)
            .map_err(|e| Status::internal(e.to_string()))?;
        let stored = stored.ok_or_else(wrong_login)?;
        let verified = tokio::task::spawn_blocking(move || {
            PasswordHash::new(&stored.password_hash).is_ok_and(|hash| {
                Argon2::default()
                    .verify_password(request.password.as_bytes(), &hash)
                    .is_ok()
            })
        })
        .await
        .unwrap_or(false);
        if !verified {
            return Err(wrong_login());
        }
        let session = Session {
            tenant,
            user: user.to_string(),
            auth_revision,
            expires: now() + limits::TOKEN_LIFE.as_secs(),
        };
        let token = make_token(&group, &session)?;
        self.0.remember(token.clone(), Arc::new(session));
        Ok(Response::new(AuthenticateResponse {
            header: Some(self.0.header(&group, group.store().state().revision)),
            token,
        }))
    }

    async fn auth_enable(
        &self,
        request: Request<AuthEnableRequest>,
    ) -> Result<Response<AuthEnableResponse>, Status> {
        let session = self.0.session(request.metadata()).await?;
        let group = self.0.group(&session).await?;
        Ok(Response::new(AuthEnableResponse {
            header: Some(self.0.header(&group, group.store().state().revision)),
        }))
    }

    async fn auth_disable(
        &self,
        request: Request<AuthDisableRequest>,
    ) -> Result<Response<AuthDisableResponse>, Status> {
        self.0.session(request.metadata()).await?;
        Err(Status::permission_denied("etcdserver: permission denied"))
    }
}
