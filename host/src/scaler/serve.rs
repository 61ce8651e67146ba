//! gRPC on a socket: HTTP/2, with TLS where certificates are given.

use crate::nats::innermost;
use anyhow::{Context as _, Result, anyhow, ensure};
use async_nats::rustls::pki_types::{CertificateDer, PrivateKeyDer, pem::PemObject as _};
use async_nats::rustls::server::WebPkiClientVerifier;
use async_nats::rustls::{RootCertStore, ServerConfig};
use hyper::body::Incoming;
use hyper::server::conn::http2::Builder;
use hyper::service::service_fn;
use hyper::{Request, Response};
use hyper_util::rt::{TokioExecutor, TokioIo, TokioTimer};
use std::convert::Infallible;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::pin::pin;
use std::sync::Arc;
use std::time::Duration;
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::{TcpListener, TcpStream};
use tokio::select;
use tokio::sync::Semaphore;
use tokio::task::JoinSet;
use tokio::time::{sleep, timeout};
use tokio_rustls::TlsAcceptor;
use tokio_util::sync::CancellationToken;
use tonic::body::Body;

/// Connections at a time; KEDA has one or two. Further ones wait.
const CONNECTIONS_MAX: usize = 256;

/// Calls at a time on one connection, open streams included: one for each ScaledObject.
const STREAMS_MAX: u32 = 4096;

/// Longest wait for a TLS handshake.
const HANDSHAKE_TIMEOUT: Duration = Duration::from_secs(5);

/// Silence after which a client is asked for a sign of life, and the wait for it.
const KEEP_ALIVE: (Duration, Duration) = (Duration::from_secs(30), Duration::from_secs(10));

/// Longest wait for calls that run when it stops.
const STOP_MAX: Duration = Duration::from_secs(5);

/// How to encrypt, and whom to let in, as typed.
#[derive(Debug, Clone, clap::Args)]
pub struct TlsArgs {
    /// Certificate to show to KEDA, with which gRPC is encrypted (PEM; read again for every connection)
    #[arg(long, value_name = "FILE", env = "MAILROOM_GRPC_TLS_CERT", requires = "grpc_tls_key")]
    grpc_tls_cert: Option<PathBuf>,

    /// Private key of --grpc-tls-cert (PEM)
    #[arg(long, value_name = "FILE", env = "MAILROOM_GRPC_TLS_KEY", requires = "grpc_tls_cert")]
    grpc_tls_key: Option<PathBuf>,

    /// Let only those in whose certificate is signed by an authority in this PEM file
    #[arg(long, value_name = "FILE", env = "MAILROOM_GRPC_TLS_CLIENT_CA", requires = "grpc_tls_cert")]
    grpc_tls_client_ca: Option<PathBuf>,
}

/// The files of TLS, checked.
#[derive(Debug, Clone)]
pub struct Tls {
    certificate: PathBuf,
    key: PathBuf,
    client_ca: Option<PathBuf>,
}

impl TlsArgs {
    /// Reads the files; `None` where there are none.
    ///
    /// # Errors
    /// A file that cannot be read or does not hold what its flag says; a certificate and a key that do not fit.
    pub fn resolve(self) -> Result<Option<Tls>> {
        let Some((certificate, key)) = self.grpc_tls_cert.zip(self.grpc_tls_key) else { return Ok(None) };
        let tls = Tls { certificate, key, client_ca: self.grpc_tls_client_ca };
        tls.load()?;
        Ok(Some(tls))
    }
}

impl Tls {
    /// Reads the files, a few kilobytes.
    fn load(&self) -> Result<TlsAcceptor> {
        let chain = certificates("--grpc-tls-cert", &self.certificate)?;
        let key = PrivateKeyDer::from_pem_file(&self.key)
            .map_err(|err| anyhow!("read --grpc-tls-key {}: {err}", self.key.display()))?;
        let builder = match &self.client_ca {
            None => ServerConfig::builder().with_no_client_auth(),
            Some(file) => {
                let mut roots = RootCertStore::empty();
                for authority in certificates("--grpc-tls-client-ca", file)? {
                    roots.add(authority).map_err(|err| anyhow!("--grpc-tls-client-ca {}: {err}", file.display()))?;
                }
                let verifier = WebPkiClientVerifier::builder(Arc::new(roots)).build();
                let verifier = verifier.map_err(|err| anyhow!("--grpc-tls-client-ca {}: {err}", file.display()))?;
                ServerConfig::builder().with_client_cert_verifier(verifier)
            }
        };
        let mut config = builder.with_single_cert(chain, key).map_err(|err| {
            let (certificate, key) = (self.certificate.display(), self.key.display());
            anyhow!("--grpc-tls-cert {certificate} and --grpc-tls-key {key} do not fit together: {err}")
        })?;
        config.alpn_protocols.push(b"h2".to_vec());
        Ok(Arc::new(config).into())
    }
}

fn certificates(flag: &str, file: &Path) -> Result<Vec<CertificateDer<'static>>> {
    let found = CertificateDer::pem_file_iter(file)
        .and_then(|certificates| certificates.collect::<Result<Vec<_>, _>>())
        .map_err(|err| anyhow!("read {flag} {}: {err}", file.display()))?;
    ensure!(!found.is_empty(), "{flag} {}: no certificate in this file", file.display());
    Ok(found)
}

/// The socket, bound and not yet served.
pub struct Grpc {
    listener: TcpListener,
    tls: Option<Tls>,
    /// Where it listens.
    pub address: SocketAddr,
}

impl Grpc {
    /// Binds `address`.
    ///
    /// # Errors
    /// The address is taken or not this machine's.
    pub async fn bind(address: SocketAddr, tls: Option<Tls>) -> Result<Self> {
        let listener = TcpListener::bind(address)
            .await
            .with_context(|| format!("listen on {address} for KEDA; choose another --grpc-listen"))?;
        let address = listener.local_addr().context("read the address of the gRPC endpoint")?;
        Ok(Self { listener, tls, address })
    }

    /// Serves until `stop`; calls that run then have a moment to end.
    pub async fn serve<S, F>(self, service: S, stop: CancellationToken)
    where
        S: Fn(Request<Incoming>) -> F + Clone + Send + 'static,
        F: Future<Output = Response<Body>> + Send + 'static,
    {
        let room = Arc::new(Semaphore::new(CONNECTIONS_MAX));
        let mut connections = JoinSet::new();
        loop {
            while connections.try_join_next().is_some() {}
            let Ok(place) = Arc::clone(&room).acquire_owned().await else { break };
            let (stream, client) = select! {
                accepted = self.listener.accept() => match accepted {
                    Ok(accepted) => accepted,
                    Err(err) => {
                        tracing::warn!("gRPC endpoint: accept: {err}");
                        sleep(Duration::from_millis(100)).await;
                        continue;
                    }
                },
                () = stop.cancelled() => break,
            };
            let (tls, service, stop) = (self.tls.clone(), service.clone(), stop.clone());
            connections.spawn(async move {
                if let Err(err) = greet(stream, tls, service, stop).await {
                    tracing::debug!(%client, "gRPC connection: {err:#}");
                }
                drop(place);
            });
        }
        let ended = async { while connections.join_next().await.is_some() {} };
        if timeout(STOP_MAX, ended).await.is_err() {
            tracing::warn!("some clients did not let go within {STOP_MAX:?}");
        }
    }
}

/// Encrypts the connection if that is wanted, and serves it.
async fn greet<S, F>(stream: TcpStream, tls: Option<Tls>, service: S, stop: CancellationToken) -> Result<()>
where
    S: Fn(Request<Incoming>) -> F + Clone + Send + 'static,
    F: Future<Output = Response<Body>> + Send + 'static,
{
    // An answer is small, and somebody waits for it.
    stream.set_nodelay(true)?;
    let Some(tls) = tls else { return converse(stream, service, stop).await };
    let acceptor = tls.load().inspect_err(|err| tracing::error!("a client was turned away: {err:#}"))?;
    let stream = select! {
        stream = timeout(HANDSHAKE_TIMEOUT, acceptor.accept(stream)) => stream.context("no TLS handshake in time")?,
        () = stop.cancelled() => return Ok(()),
    };
    let stream = stream.inspect_err(|err| tracing::warn!("a client was turned away: TLS: {}", innermost(err)))?;
    converse(stream, service, stop).await
}

async fn converse<S, F>(
    stream: impl AsyncRead + AsyncWrite + Unpin + 'static,
    service: S,
    stop: CancellationToken,
) -> Result<()>
where
    S: Fn(Request<Incoming>) -> F + Clone,
    F: Future<Output = Response<Body>> + Send + 'static,
{
    let service = service_fn(move |request| {
        let answer = service(request);
        async move { Ok::<_, Infallible>(answer.await) }
    });
    let connection = Builder::new(TokioExecutor::new())
        .timer(TokioTimer::new())
        .max_concurrent_streams(STREAMS_MAX)
        .keep_alive_interval(KEEP_ALIVE.0)
        .keep_alive_timeout(KEEP_ALIVE.1)
        .serve_connection(TokioIo::new(stream), service);
    let mut connection = pin!(connection);
    select! {
        end = connection.as_mut() => return Ok(end?),
        () = stop.cancelled() => connection.as_mut().graceful_shutdown(),
    }
    Ok(connection.await?)
}
