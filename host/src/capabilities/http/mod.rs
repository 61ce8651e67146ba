//! `wasi:http/outgoing-handler`: requests to the servers that the operator lists, and to no others.
//!
//! Every request has a connection of its own. A name is looked up once, its addresses are checked, and one of those that
//! were checked is connected to, so that a name which means another address a moment later gains nothing. Redirects are
//! answers like others: a guest that follows one asks anew. Proxies that the environment names are not used. What goes
//! wrong the guest is told as an error of `wasi:http`, within its deadline.

mod allowed;

pub use allowed::Allowed;

use super::usage::Usage;
use super::{Grants, State};
use allowed::{Host, Server, admits, lists};
use anyhow::{Context as _, Result, anyhow, ensure};
use bytesize::ByteSize;
use futures::FutureExt as _;
use http_body_util::BodyExt as _;
use hyper::body::{Body, Bytes, Frame, Incoming, SizeHint};
use hyper::client::conn::http1;
use hyper::header::{CONNECTION, HeaderValue};
use hyper::{HeaderMap, Method, Request, Response, Uri};
use hyper_util::rt::TokioIo;
use std::error::Error as _;
use std::io;
use std::net::{SocketAddr, ToSocketAddrs as _};
use std::path::{Path, PathBuf};
use std::pin::{Pin, pin};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::task::{Context, Poll, ready};
use std::time::Duration;
use tokio::net::TcpStream;
use tokio::select;
use tokio::sync::{OwnedSemaphorePermit, Semaphore, oneshot};
use tokio::time::{Instant, Sleep, sleep_until, timeout_at};
use tokio_rustls::TlsConnector;
use tokio_rustls::rustls::pki_types::pem::PemObject as _;
use tokio_rustls::rustls::pki_types::{CertificateDer, ServerName};
use tokio_rustls::rustls::{self, ClientConfig, RootCertStore};
use tokio_util::either::Either;
use wasmtime::StoreContextMut;
use wasmtime::component::{Linker, Resource, ResourceTable};
use wasmtime_wasi_http::p2::bindings::http::types::{ErrorCode, IoError};
use wasmtime_wasi_http::{
    Error, RequestOptions, WasiBody, WasiHttpCtx, WasiHttpCtxView, WasiHttpHooks, WasiHttpView as _,
};

/// Requests of one instance at the same time, up to the end of the response.
const REQUESTS_PER_INSTANCE: usize = 8;

/// Requests of all instances at the same time; further ones wait.
const REQUESTS: usize = 256;

/// Names that are looked up at the same time; further ones wait.
const LOOK_UPS: usize = 64;

/// Most bytes of a request's header section, and what is read at a time of a response: hyper refuses one whose header
/// section is twice as long.
const HEAD_MAX_BYTES: usize = 64 << 10;

/// Most bytes of a path with its query.
const PATH_MAX_BYTES: usize = 8 << 10;

/// What a guest may write into a request's body at a time.
const CHUNK_BYTES: usize = 16 << 10;

/// Things of `wasi:http` and of WASI that an instance which uses `wasi:http` may have at the same time: header sections
/// and bodies take memory of the host's.
const RESOURCES_MAX: usize = 512;

/// Arguments that say which servers guests may ask.
#[derive(Debug, Clone, clap::Args)]
pub struct HttpArgs {
    /// Servers that guests may ask through wasi:http, `https://HOST[:PORT]` or `http://HOST[:PORT]`, and networks,
    /// `10.1.0.0/16`, in which they may be although they are not on the Internet; repeatable
    #[arg(long = "allow-http", value_name = "SERVER", env = "MAILROOM_ALLOW_HTTP", value_delimiter = ',')]
    allowed: Vec<Allowed>,

    /// Certificates of authorities that vouch for those servers, beside the system's (PEM)
    #[arg(long = "http-ca", value_name = "FILE", env = "MAILROOM_HTTP_CA", requires = "allowed")]
    ca: Option<PathBuf>,

    /// Largest body that guests may send or get
    #[arg(long = "http-body-max", value_name = "SIZE", env = "MAILROOM_HTTP_BODY_MAX", default_value = "1MiB")]
    body_max: ByteSize,
}

impl HttpArgs {
    /// Reads the certificates. A request then takes at most `patience`, up to the end of the response.
    ///
    /// # Errors
    /// A list that allows nothing; certificates that cannot be read, or none at all where one is needed.
    pub fn resolve(&self, patience: Duration) -> Result<Http> {
        let mut servers = self.allowed.iter().filter_map(|allowed| match allowed {
            Allowed::Server(server) => Some(server),
            Allowed::Network(_) => None,
        });
        ensure!(
            self.allowed.is_empty() || servers.clone().next().is_some(),
            "--allow-http: lists networks and no server in them; add https://HOST"
        );
        let tls = match servers.find(|server| server.tls) {
            Some(server) => Some(tls(self.ca.as_deref(), server)?),
            None => None,
        };
        Ok(Http {
            allowed: self.allowed.clone(),
            tls,
            body_max_bytes: self.body_max.as_u64(),
            patience,
            ..Http::default()
        })
    }
}

/// What encrypts connections: to servers that the system's authorities vouch for, or those in the file. `server` is the
/// one it is needed for.
fn tls(ca: Option<&Path>, server: &Server) -> Result<TlsConnector> {
    let mut roots = RootCertStore::empty();
    roots.add_parsable_certificates(rustls_native_certs::load_native_certs().certs);
    if let Some(file) = ca {
        let read = |err| anyhow!("read --http-ca {}: {err}", file.display());
        let certificates = CertificateDer::pem_file_iter(file).and_then(Iterator::collect::<Result<Vec<_>, _>>);
        let certificates = certificates.map_err(read)?;
        ensure!(!certificates.is_empty(), "--http-ca {}: no certificate in this file", file.display());
        for certificate in certificates {
            roots.add(certificate).with_context(|| format!("--http-ca {}", file.display()))?;
        }
    }
    ensure!(
        !roots.is_empty(),
        "--allow-http {server}: no certificates of authorities on this system; name a file with --http-ca"
    );
    let provider = Arc::new(rustls::crypto::ring::default_provider());
    let config = ClientConfig::builder_with_provider(provider).with_safe_default_protocol_versions();
    let config = config.context("encryption of requests")?.with_root_certificates(roots).with_no_client_auth();
    Ok(TlsConnector::from(Arc::new(config)))
}

/// What the operator lets guests ask; by default nothing. Clones count their requests together.
#[derive(Clone)]
pub struct Http {
    allowed: Vec<Allowed>,
    /// There if a server is listed that needs it.
    tls: Option<TlsConnector>,
    body_max_bytes: u64,
    patience: Duration,
    requests: Arc<Semaphore>,
    look_ups: Arc<Semaphore>,
}

impl Default for Http {
    fn default() -> Self {
        Self {
            allowed: Vec::new(),
            tls: None,
            body_max_bytes: 0,
            patience: Duration::ZERO,
            requests: Arc::new(Semaphore::new(REQUESTS)),
            look_ups: Arc::new(Semaphore::new(LOOK_UPS)),
        }
    }
}

impl std::fmt::Debug for Http {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Http").field("allowed", &self.allowed).finish_non_exhaustive()
    }
}

impl Http {
    /// Granted, without a server: for a component that is only tried out.
    #[cfg(feature = "compile")]
    pub fn for_trial() -> Self {
        Self { allowed: vec![Allowed::Network(allowed::NOWHERE)], ..Self::default() }
    }

    /// Whether guests that want to ask something are run.
    pub fn is_granted(&self) -> bool {
        !self.allowed.is_empty()
    }

    /// Carries the exchange out, up to the head of the response; its body is bounded, and ends the exchange.
    async fn exchange(
        &self,
        request: Request<WasiBody>,
        options: RequestOptions,
        mut exchange: Exchange,
    ) -> Result<Answer, Error> {
        let by = exchange.started + self.patience;
        let request_too_large = Arc::<AtomicBool>::default();
        let too_large = request_too_large.clone();
        let request = request.map(|body| Sent { body, left: self.body_max_bytes, too_large });
        let (response, connection) = match self.ask(request, options, by, &mut exchange.places).await {
            Ok(answer) => answer,
            Err(err) => return Err(exchange.failed(err)),
        };
        exchange.outcome = "response";
        let patience = options.between_bytes_timeout;
        let next_by = patience.map_or(by, |patience| by.min(Instant::now() + patience));
        let response = response.map(|body| {
            let next_by = Box::pin(sleep_until(next_by));
            Received { body, left: self.body_max_bytes, by, patience, next_by, request_too_large, exchange }
                .boxed_unsync()
        });
        Ok((response, connection))
    }

    /// Sends the request and waits for the head of the response. Both until `by` at the latest.
    async fn ask(
        &self,
        request: Request<Sent>,
        options: RequestOptions,
        by: Instant,
        places: &mut Vec<OwnedSemaphorePermit>,
    ) -> Result<(Response<Incoming>, Connection), Error> {
        let server = Server::named_in(request.uri()).filter(|server| lists(&self.allowed, server));
        let Some(server) = server.filter(|_| request.method() != Method::CONNECT) else {
            tracing::debug!("--allow-http does not allow {} {}", request.method(), request.uri());
            return Err(Error::HttpRequestDenied);
        };
        check_size(&request, self.body_max_bytes)?;
        let place = timeout_at(by, self.requests.clone().acquire_owned()).await;
        places.push(place.map_err(|_| Error::ConnectionTimeout)?.map_err(|_| Error::ConnectionLimitReached)?);
        let until = |limit: Option<Duration>| limit.map_or(by, |limit| by.min(Instant::now() + limit));
        let stream = self.connect(&server, until(options.connect_timeout)).await?;
        let answer = timeout_at(until(options.first_byte_timeout), converse(stream, request)).await;
        let (response, connection) = answer.unwrap_or(Err(Error::HttpResponseTimeout))?;
        match response.body().size_hint().lower() {
            bytes if bytes > self.body_max_bytes => Err(Error::HttpResponseBodySize(Some(bytes))),
            _ => Ok((response, connection)),
        }
    }

    /// A connection to the server, encrypted where it says so.
    async fn connect(&self, server: &Server, by: Instant) -> Result<Stream, Error> {
        let addresses = timeout_at(by, self.look_up(server)).await.unwrap_or(Err(Error::DnsTimeout))?;
        let (admitted, refused): (Vec<_>, Vec<_>) =
            addresses.into_iter().partition(|&address| admits(&self.allowed, address));
        if admitted.is_empty() && !refused.is_empty() {
            tracing::debug!("--allow-http allows {server}, but not where it is: {refused:?}");
            return Err(Error::DestinationIpProhibited);
        }
        let stream = connect_to_one(&admitted, by).await?;
        if !server.tls {
            return Ok(Either::Left(stream));
        }
        // Who lists a server that needs it has got it.
        let tls = self.tls.as_ref().ok_or(Error::ConfigurationError)?;
        let name = match &server.host {
            Host::Name(name) => ServerName::try_from(name.clone()).map_err(|_| Error::TlsProtocolError)?,
            Host::Address(ip) => ServerName::from(*ip),
        };
        let encrypted = timeout_at(by, tls.connect(name, stream)).await.map_err(|_| Error::ConnectionTimeout)?;
        encrypted.map(Either::Right).map_err(|err| tls_error(&err))
    }

    /// The server's addresses. The system is asked on a thread of its own, which nobody waits for in the end: it may take
    /// longer than any deadline.
    async fn look_up(&self, server: &Server) -> Result<Vec<SocketAddr>, Error> {
        let name = match &server.host {
            Host::Address(ip) => return Ok(vec![SocketAddr::new(*ip, server.port)]),
            Host::Name(name) => name.clone(),
        };
        let place = self.look_ups.clone().acquire_owned().await.map_err(|_| Error::ConnectionLimitReached)?;
        let (sender, receiver) = oneshot::channel();
        let port = server.port;
        let asking = move || {
            // A guest that is gone waits for nothing.
            let _ = sender.send((name.as_str(), port).to_socket_addrs().map(Vec::from_iter));
            drop(place);
        };
        let failed = |err: io::Error| Error::DnsError { rcode: Some(err.to_string()), info_code: None };
        std::thread::Builder::new().name("look-up".to_owned()).spawn(asking).map_err(failed)?;
        match receiver.await {
            Ok(addresses) => addresses.map_err(failed),
            Err(_) => Err(Error::DestinationNotFound),
        }
    }
}

/// The interface as wasmtime implements it; components may import another 0.2.
const TYPES: &str = "wasi:http/types@0.2.12";

/// Links what guests may have of `wasi:http`.
pub(super) fn link(linker: &mut Linker<State>) -> wasmtime::Result<()> {
    wasmtime_wasi_http::p2::add_only_http_to_linker_async(linker)?;
    // Wasmtime's own knows no error with which the body of a response ends.
    linker.allow_shadowing(true);
    linker.instance(TYPES)?.func_wrap(
        "http-error-code",
        |mut store: StoreContextMut<'_, State>, (error,): (Resource<IoError>,)| {
            let error = store.data_mut().http().table.get(&error)?;
            let code = error.downcast_ref::<ErrorCode>().cloned();
            Ok((code.or_else(|| error.downcast_ref().map(body_error_code)),))
        },
    )?;
    linker.allow_shadowing(false);
    Ok(())
}

/// What the guest is told of an error with which the body of a response ends.
fn body_error_code(error: &Error) -> ErrorCode {
    match error {
        Error::ConnectionTerminated => ErrorCode::ConnectionTerminated,
        Error::HttpProtocolError => ErrorCode::HttpProtocolError,
        Error::HttpRequestBodySize(bytes) => ErrorCode::HttpRequestBodySize(*bytes),
        Error::HttpResponseBodySize(bytes) => ErrorCode::HttpResponseBodySize(*bytes),
        Error::HttpResponseIncomplete => ErrorCode::HttpResponseIncomplete,
        Error::HttpResponseTimeout => ErrorCode::HttpResponseTimeout,
        other => ErrorCode::InternalError(Some(other.to_string())),
    }
}

/// The requests of one instance.
pub(super) struct Session {
    requests: Requests,
    context: WasiHttpCtx,
}

impl Session {
    /// For an instance whose resources are in `table`.
    pub fn new(grants: Arc<Grants>, table: &mut ResourceTable) -> Self {
        table.set_max_capacity(RESOURCES_MAX);
        let mut context = WasiHttpCtx::new();
        context.set_field_size_limit(HEAD_MAX_BYTES);
        Self { requests: Requests { grants, places: Arc::new(Semaphore::new(REQUESTS_PER_INSTANCE)) }, context }
    }

    /// What wasmtime's `wasi:http` works on.
    pub fn view<'a>(&'a mut self, table: &'a mut ResourceTable) -> WasiHttpCtxView<'a> {
        WasiHttpCtxView { hooks: &mut self.requests, table, ctx: &mut self.context }
    }
}

struct Requests {
    grants: Arc<Grants>,
    places: Arc<Semaphore>,
}

type Answer = (Response<WasiBody>, Connection);

impl WasiHttpHooks for Requests {
    fn send_request(
        &mut self,
        request: Request<WasiBody>,
        options: Option<RequestOptions>,
        _: Box<dyn Future<Output = Result<(), Error>> + Send>,
    ) -> Box<dyn Future<Output = Result<Answer, Error>> + Send> {
        let grants = self.grants.clone();
        let mut exchange =
            Exchange { usage: grants.usage.clone(), started: Instant::now(), outcome: "abandoned", places: Vec::new() };
        let place = self.places.clone().try_acquire_owned();
        Box::new(async move {
            match place {
                Ok(place) => exchange.places.push(place),
                Err(_) => return Err(exchange.failed(Error::ConnectionLimitReached)),
            }
            grants.http.exchange(request, options.unwrap_or_default(), exchange).await
        })
    }

    fn p2_outgoing_body_chunk_size(&mut self) -> usize {
        CHUNK_BYTES
    }
}

type Stream = Either<TcpStream, tokio_rustls::client::TlsStream<TcpStream>>;

/// What moves bytes between hyper and the server as long as it is polled. Never fails: the response tells what went wrong.
type Connection = Box<dyn Future<Output = Result<(), Error>> + Send>;

/// Refuses what the server would have to be sent too much for.
fn check_size(request: &Request<Sent>, body_max_bytes: u64) -> Result<(), Error> {
    let path = request.uri().path_and_query().map_or(0, |path| path.as_str().len());
    if path > PATH_MAX_BYTES {
        return Err(Error::HttpRequestUriTooLong);
    }
    let head: usize = request.headers().iter().map(|(name, value)| name.as_str().len() + value.len() + 4).sum();
    if head > HEAD_MAX_BYTES {
        return Err(Error::HttpRequestHeaderSectionSize(u32::try_from(head).ok()));
    }
    let length = |headers: &HeaderMap| headers.get(hyper::header::CONTENT_LENGTH)?.to_str().ok()?.parse::<u64>().ok();
    match length(request.headers()) {
        Some(length) if length > body_max_bytes => Err(Error::HttpRequestBodySize(Some(length))),
        _ => Ok(()),
    }
}

/// A connection to the first address that takes one; each gets its share of the time.
async fn connect_to_one(addresses: &[SocketAddr], by: Instant) -> Result<TcpStream, Error> {
    let mut failure = Error::DestinationNotFound;
    for (index, &address) in addresses.iter().enumerate() {
        let now = Instant::now();
        let left = u32::try_from(addresses.len() - index).unwrap_or(u32::MAX);
        let share = now + by.saturating_duration_since(now) / left;
        failure = match timeout_at(share, TcpStream::connect(address)).await {
            Ok(Ok(stream)) => return Ok(stream),
            Ok(Err(err)) => match err.kind() {
                io::ErrorKind::ConnectionRefused => Error::ConnectionRefused,
                io::ErrorKind::NetworkUnreachable => Error::DestinationIpUnroutable,
                io::ErrorKind::TimedOut => Error::ConnectionTimeout,
                _ => Error::DestinationUnavailable,
            },
            Err(_) => Error::ConnectionTimeout,
        };
    }
    Err(failure)
}

fn tls_error(err: &io::Error) -> Error {
    match err.get_ref().and_then(|err| err.downcast_ref::<rustls::Error>()) {
        Some(rustls::Error::InvalidCertificate(_) | rustls::Error::NoCertificatesPresented) => {
            Error::TlsCertificateError
        }
        Some(rustls::Error::AlertReceived(alert)) => {
            Error::TlsAlertReceived { alert_id: Some((*alert).into()), alert_message: Some(format!("{alert:?}")) }
        }
        _ => Error::TlsProtocolError,
    }
}

/// Sends the request and waits for the head of the response.
async fn converse(stream: Stream, mut request: Request<Sent>) -> Result<(Response<Incoming>, Connection), Error> {
    let too_large = request.body().too_large.clone();
    let failed = |err: hyper::Error| failure(&err, &too_large);
    let mut builder = http1::Builder::new();
    builder.max_buf_size(HEAD_MAX_BYTES);
    let (mut sender, connection) = builder.handshake(TokioIo::new(stream)).await.map_err(failed)?;
    // What names the server is for proxies.
    let path = request.uri().path_and_query().map_or("/", |path| path.as_str());
    *request.uri_mut() = Uri::builder().path_and_query(path).build().map_err(|_| Error::HttpRequestUriInvalid)?;
    request.headers_mut().insert(CONNECTION, HeaderValue::from_static("close"));
    let mut connection = Box::pin(connection.fuse());
    let mut response = pin!(sender.send_request(request));
    let response = select! {
        biased;
        response = &mut response => response,
        ended = &mut connection => match ended {
            Ok(()) => response.await,
            Err(err) => Err(err),
        },
    };
    let response = response.map_err(failed)?;
    Ok((response, Box::new(connection.map(|_| Ok(())))))
}

/// What the guest is told of an error of hyper's.
fn failure(err: &hyper::Error, too_large: &AtomicBool) -> Error {
    let io = err.source().and_then(|err| err.downcast_ref::<io::Error>());
    let is_cut = err.is_incomplete_message() || io.is_some_and(|err| err.kind() == io::ErrorKind::UnexpectedEof);
    match too_large.load(Ordering::Relaxed) {
        true => Error::HttpRequestBodySize(None),
        false if err.is_parse_too_large() => Error::HttpResponseHeaderSectionSize(None),
        false if is_cut => Error::HttpResponseIncomplete,
        false if err.is_parse() => Error::HttpProtocolError,
        false => Error::ConnectionTerminated,
    }
}

/// A request's body, up to its bound.
struct Sent {
    body: WasiBody,
    left: u64,
    /// Set when it becomes larger: hyper does not tell all who wait.
    too_large: Arc<AtomicBool>,
}

impl Body for Sent {
    type Data = Bytes;
    type Error = Error;

    fn poll_frame(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, Error>>> {
        let frame = ready!(Pin::new(&mut self.body).poll_frame(cx));
        if let Some(Ok(frame)) = &frame {
            let Some(left) = self.left.checked_sub(bytes(frame)) else {
                self.too_large.store(true, Ordering::Relaxed);
                return Poll::Ready(Some(Err(Error::HttpRequestBodySize(None))));
            };
            self.left = left;
        }
        Poll::Ready(frame)
    }

    fn is_end_stream(&self) -> bool {
        self.body.is_end_stream()
    }

    fn size_hint(&self) -> SizeHint {
        self.body.size_hint()
    }
}

fn bytes(frame: &Frame<Bytes>) -> u64 {
    frame.data_ref().map_or(0, |data| data.len() as u64)
}

/// A response's body, up to its bounds in size and time.
struct Received {
    body: Incoming,
    left: u64,
    /// When the whole of it has to be there.
    by: Instant,
    /// How long the guest waits for its next piece.
    patience: Option<Duration>,
    next_by: Pin<Box<Sleep>>,
    request_too_large: Arc<AtomicBool>,
    exchange: Exchange,
}

impl Body for Received {
    type Data = Bytes;
    type Error = Error;

    fn poll_frame(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, Error>>> {
        let this = &mut *self;
        let failure = match Pin::new(&mut this.body).poll_frame(cx) {
            Poll::Ready(Some(Ok(frame))) => match this.left.checked_sub(bytes(&frame)) {
                Some(left) => {
                    this.left = left;
                    if let Some(patience) = this.patience {
                        this.next_by.as_mut().reset(this.by.min(Instant::now() + patience));
                    }
                    return Poll::Ready(Some(Ok(frame)));
                }
                None => Error::HttpResponseBodySize(None),
            },
            Poll::Ready(Some(Err(err))) => failure(&err, &this.request_too_large),
            Poll::Ready(None) => return Poll::Ready(None),
            Poll::Pending => {
                ready!(this.next_by.as_mut().poll(cx));
                Error::HttpResponseTimeout
            }
        };
        Poll::Ready(Some(Err(this.exchange.failed(failure))))
    }

    fn is_end_stream(&self) -> bool {
        self.body.is_end_stream()
    }

    fn size_hint(&self) -> SizeHint {
        self.body.size_hint()
    }
}

/// A request from its beginning to the end of its response. It is counted when it is dropped, by what came of it.
struct Exchange {
    usage: Usage,
    started: Instant,
    outcome: &'static str,
    /// Its places among the requests of its instance and of all.
    places: Vec<OwnedSemaphorePermit>,
}

impl Exchange {
    /// Notes what went wrong.
    fn failed(&mut self, error: Error) -> Error {
        self.outcome = outcome(&error);
        error
    }
}

impl Drop for Exchange {
    fn drop(&mut self) {
        self.usage.http_request(self.outcome, self.started.elapsed());
    }
}

/// The outcome of a request that failed, in the metrics.
fn outcome(error: &Error) -> &'static str {
    match error {
        Error::HttpRequestDenied => "denied",
        Error::DestinationIpProhibited => "prohibited",
        Error::ConnectionLimitReached => "limit",
        Error::DnsTimeout | Error::ConnectionTimeout | Error::HttpResponseTimeout => "timeout",
        Error::HttpRequestUriTooLong
        | Error::HttpRequestHeaderSectionSize(_)
        | Error::HttpRequestBodySize(_)
        | Error::HttpResponseHeaderSectionSize(_)
        | Error::HttpResponseBodySize(_) => "too-large",
        _ => "failed",
    }
}
