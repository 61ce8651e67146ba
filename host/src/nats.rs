//! Connecting to NATS: the options every command shares, and errors that say what to do about them.

use anyhow::{Context as _, Result, anyhow, bail, ensure};
use async_nats::jetstream::consumer::{Consumer, pull::OrderedConfig};
use async_nats::jetstream::context::{ContextBuilder, RequestErrorKind};
use async_nats::jetstream::response::Response;
use async_nats::jetstream::stream::ConsumerErrorKind;
use async_nats::jetstream::{Context, ErrorCode};
use async_nats::rustls::pki_types::{CertificateDer, PrivateKeyDer, pem::PemObject};
use async_nats::{Auth, AuthError, Client, ConnectErrorKind, ConnectOptions, Event, ReconnectToServer};
use async_nats::{ServerAddr, ServerError, rustls};
use serde_json::{Value, json};
use std::error::Error;
use std::fmt;
use std::hash::{BuildHasher, RandomState};
use std::io::{self, Write as _};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

/// How long one attempt to reach one server may take, TLS and authentication included.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(5);
/// Silence after which the server is asked for a sign of life. When the third time comes without one, after 15 s, the
/// connection is given up: a network that is cut ends none by itself.
const PING_INTERVAL: Duration = Duration::from_secs(5);
/// The longest pause between two attempts to reconnect.
const RECONNECT_DELAY_MAX: Duration = Duration::from_secs(5);
/// The pause after the first attempt that failed on every server; it doubles from there.
const RECONNECT_DELAY_FIRST: Duration = Duration::from_millis(50);
/// A connection that ends sooner than this counts as another failed attempt.
const SHORT_LIVED: Duration = Duration::from_secs(10);
/// Commands (publish, subscribe, …) that wait for the connection before a caller has to wait.
const CLIENT_CAPACITY: usize = 8192;
/// Messages a subscription holds for a slow reader before async-nats drops them.
const SUBSCRIPTION_CAPACITY: usize = 65_536;

/// Where NATS is and how to log in, as typed.
#[derive(Debug, Clone, clap::Args)]
#[command(next_help_heading = "NATS")]
pub struct NatsArgs {
    /// NATS server to connect to; separate several with commas or repeat the flag.
    /// A server's other cluster members are found by themselves
    #[arg(
        short,
        long = "server",
        value_name = "URL",
        env = "MAILROOM_SERVER",
        value_delimiter = ',',
        default_value = "nats://127.0.0.1:4222",
        hide_env_values = true
    )]
    pub servers: Vec<Secret>,

    /// Log in with a credentials file (user JWT and nkey seed, from `nsc generate creds`)
    #[arg(
        long,
        value_name = "FILE",
        env = "MAILROOM_CREDS",
        conflicts_with_all = ["user", "password", "password_file", "token", "token_file", "nkey_file"]
    )]
    pub creds: Option<PathBuf>,

    /// Log in as this user; needs --password or --password-file
    #[arg(
        long,
        value_name = "NAME",
        env = "MAILROOM_USER",
        conflicts_with_all = ["token", "token_file", "nkey_file"]
    )]
    pub user: Option<String>,

    /// Password of --user. Other users of the machine can see it in the process list: prefer --password-file
    #[arg(
        long,
        value_name = "PASSWORD",
        env = "MAILROOM_PASSWORD",
        hide_env_values = true,
        requires = "user",
        conflicts_with = "password_file"
    )]
    pub password: Option<Secret>,

    /// File that holds the password of --user (a newline at its end is ignored)
    #[arg(long, value_name = "FILE", env = "MAILROOM_PASSWORD_FILE", requires = "user")]
    pub password_file: Option<PathBuf>,

    /// Log in with this token. Visible in the process list: prefer --token-file
    #[arg(
        long,
        value_name = "TOKEN",
        env = "MAILROOM_TOKEN",
        hide_env_values = true,
        conflicts_with_all = ["token_file", "nkey_file"]
    )]
    pub token: Option<Secret>,

    /// File that holds the token (a newline at its end is ignored)
    #[arg(long, value_name = "FILE", env = "MAILROOM_TOKEN_FILE", conflicts_with = "nkey_file")]
    pub token_file: Option<PathBuf>,

    /// Log in with the nkey seed (`SU…`) in this file
    #[arg(long, value_name = "FILE", env = "MAILROOM_NKEY_FILE")]
    pub nkey_file: Option<PathBuf>,

    /// Refuse a connection that is not encrypted; any other --tls flag implies it
    #[arg(long, env = "MAILROOM_TLS", value_parser = clap::builder::BoolishValueParser::new())]
    pub tls: bool,

    /// Start TLS before the server says anything, for servers with `handshake_first`
    #[arg(long, env = "MAILROOM_TLS_FIRST", value_parser = clap::builder::BoolishValueParser::new())]
    pub tls_first: bool,

    /// Trust only the certificate authorities in this PEM file, instead of the system's
    #[arg(long, value_name = "FILE", env = "MAILROOM_TLS_CA")]
    pub tls_ca: Option<PathBuf>,

    /// Certificate to show to a server that asks for one (PEM)
    #[arg(long, value_name = "FILE", env = "MAILROOM_TLS_CERT", requires = "tls_key")]
    pub tls_cert: Option<PathBuf>,

    /// Private key of --tls-cert (PEM)
    #[arg(long, value_name = "FILE", env = "MAILROOM_TLS_KEY", requires = "tls_cert")]
    pub tls_key: Option<PathBuf>,

    /// JetStream domain to use, as behind a leaf node
    #[arg(long, value_name = "NAME", env = "MAILROOM_JS_DOMAIN", conflicts_with = "js_api_prefix")]
    pub js_domain: Option<String>,

    /// Subject prefix of the JetStream API, as of an imported account [default: $JS.API]
    #[arg(long, value_name = "SUBJECT", env = "MAILROOM_JS_API_PREFIX")]
    pub js_api_prefix: Option<String>,

    /// Subject prefix for replies, where permissions do not allow the default [default: _INBOX]
    #[arg(long, value_name = "SUBJECT", env = "MAILROOM_INBOX_PREFIX")]
    pub inbox_prefix: Option<String>,
}

/// Text that is not shown when its holder is printed for debugging.
#[derive(Clone, PartialEq, Eq)]
pub struct Secret(String);

impl Secret {
    /// The text itself.
    pub fn reveal(&self) -> &str {
        &self.0
    }
}

impl From<String> for Secret {
    fn from(text: String) -> Self {
        Self(text)
    }
}

impl fmt::Debug for Secret {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Secret(…)")
    }
}

impl NatsArgs {
    /// Checks the options and the files they name; opens no connection.
    ///
    /// # Errors
    /// A server that is no NATS URL, a file that cannot be read or does not hold what its flag says,
    /// options that contradict each other.
    pub fn resolve(self) -> Result<Nats> {
        let mut servers = Vec::new();
        let mut from_urls = Vec::new();
        for url in &self.servers {
            let (server, login) = server(url.reveal())?;
            servers.push(server);
            from_urls.push(login);
        }
        ensure!(!servers.is_empty(), "no NATS server given; name one with --server");
        let from_url = from_urls.swap_remove(0);
        ensure!(
            from_urls.iter().all(|login| *login == from_url),
            "the servers of --server carry different logins; use --user and --password-file instead"
        );

        let by_flags = match (self.creds, self.user, self.token, self.token_file, self.nkey_file) {
            (Some(file), ..) => Login::Creds(file),
            (_, Some(user), ..) => Login::User {
                password: match (self.password, self.password_file) {
                    (Some(password), _) => Source::Given(password),
                    (None, Some(file)) => Source::File(file),
                    (None, None) => bail!("--user {user} has no password; add --password-file FILE"),
                },
                user,
            },
            (_, _, Some(token), ..) => Login::Token(Source::Given(token)),
            (_, _, _, Some(file), _) => Login::Token(Source::File(file)),
            (.., Some(file)) => Login::Nkey(file),
            _ => Login::Nobody,
        };
        let login = match (by_flags, from_url) {
            (Login::Nobody, from_url) => from_url,
            (by_flags, Login::Nobody) => by_flags,
            _ => bail!("--server carries a login and so does {}; use one of them", "another flag"),
        };
        login.auth(&[])?;

        if let Some(file) = &self.tls_ca {
            let count = CertificateDer::pem_file_iter(file)
                .and_then(|certificates| certificates.collect::<Result<Vec<_>, _>>())
                .map_err(|err| anyhow!("read --tls-ca {}: {err}", file.display()))?
                .len();
            ensure!(count > 0, "--tls-ca {}: no certificate in this file", file.display());
        }
        let client = self.tls_cert.zip(self.tls_key);
        if let Some((certificate, key)) = &client {
            check_pair(certificate, key)?;
        }

        let api = match (self.js_domain, self.js_api_prefix) {
            (Some(domain), _) => {
                crate::names::check_name("--js-domain", &domain)?;
                format!("$JS.{domain}.API")
            }
            (None, Some(prefix)) => {
                let prefix = prefix.trim_end_matches('.').to_owned();
                crate::names::check_subject("--js-api-prefix", &prefix)?;
                prefix
            }
            (None, None) => "$JS.API".to_owned(),
        };
        if let Some(prefix) = &self.inbox_prefix {
            crate::names::check_subject("--inbox-prefix", prefix)?;
        }
        Ok(Nats {
            tls: self.tls || self.tls_first || self.tls_ca.is_some() || client.is_some(),
            tls_first: self.tls_first,
            tls_ca: self.tls_ca,
            tls_client: client,
            servers,
            login: Arc::new(login),
            api,
            inbox_prefix: self.inbox_prefix,
        })
    }
}

/// Where NATS is and how to log in, as meant: checked, and good for any number of connections.
#[derive(Debug, Clone)]
pub struct Nats {
    servers: Vec<ServerAddr>,
    login: Arc<Login>,
    tls: bool,
    tls_first: bool,
    tls_ca: Option<PathBuf>,
    tls_client: Option<(PathBuf, PathBuf)>,
    api: String,
    inbox_prefix: Option<String>,
}

/// Why there is no connection.
#[derive(Debug, thiserror::Error)]
pub enum ConnectError {
    /// No server answered, or it cannot take us now. Worth another attempt later.
    #[error("connect to NATS at {url}: {reason}")]
    Away {
        /// The server, without user and password.
        url: String,
        /// What happened.
        reason: String,
    },
    /// A server answered and does not let us in, or we do not trust it. The configuration has to change
    /// (or the files it names: they are read again at every attempt).
    #[error("connect to NATS at {url}: {reason}")]
    Refused {
        /// The server, without user and password.
        url: String,
        /// What happened, with the flag to look at.
        reason: String,
    },
}

impl Nats {
    /// The subjects of JetStream's API begin with this.
    pub fn api_prefix(&self) -> &str {
        &self.api
    }

    /// The defaults, and this server: for a private one such as [`DevServer`](crate::dev::DevServer).
    ///
    /// # Errors
    /// `url` is no NATS URL.
    pub fn at(url: &str) -> Result<Self> {
        let (server, login) = server(url)?;
        Ok(Self {
            servers: vec![server],
            login: Arc::new(login),
            tls: false,
            tls_first: false,
            tls_ca: None,
            tls_client: None,
            api: "$JS.API".to_owned(),
            inbox_prefix: None,
        })
    }

    /// The servers, comma separated, without user and password: for messages and logs.
    pub fn servers(&self) -> String {
        self.servers.iter().map(shown).collect::<Vec<_>>().join(", ")
    }

    /// Connects once to the first server that answers, in random order, and stays connected.
    ///
    /// The client reconnects by itself for as long as it lives, at most [`RECONNECT_DELAY_MAX`] apart, and reads
    /// credentials and certificates anew each time, so that they can be rotated. `name` is what the server shows.
    ///
    /// `on_event` gets what happens later, on the connection's runtime: it must not block. Ask [`refusal`] whether
    /// an event means that the server no longer lets us in; async-nats goes on trying all the same.
    ///
    /// Subjects to publish to are not checked by the client: they must be valid (see [`crate::names`]).
    ///
    /// # Errors
    /// [`ConnectError::Refused`] if any server refused us, else [`ConnectError::Away`] if none answered within
    /// five seconds each.
    pub async fn connect(
        &self,
        name: &str,
        on_event: impl Fn(Event) + Clone + Send + Sync + 'static,
    ) -> Result<Client, ConnectError> {
        // The login is tried first only for its message: inside async-nats it would lose the file's name.
        self.login
            .auth(&[])
            .map_err(|err| ConnectError::Refused { url: self.servers(), reason: format!("{err:#}") })?;
        let mut servers = self.servers.clone();
        servers.sort_by_cached_key(|_| random());
        let mut failure = None;
        for server in servers {
            match self.connect_to(&server, name, on_event.clone()).await {
                Ok(client) => return Ok(client),
                Err(err) => {
                    let err = self.explain(&server, &err);
                    if failure.is_none() || matches!(err, ConnectError::Refused { .. }) {
                        failure = Some(err);
                    }
                }
            }
        }
        Err(failure.unwrap_or_else(|| ConnectError::Away { url: self.servers(), reason: "no server given".into() }))
    }

    /// One attempt, at `server` first; the others are for later reconnects.
    async fn connect_to(
        &self,
        server: &ServerAddr,
        name: &str,
        on_event: impl Fn(Event) + Send + Sync + 'static,
    ) -> Result<Client, async_nats::ConnectError> {
        let login = Arc::clone(&self.login);
        let server_count = self.servers.len();
        let first = Arc::new(AtomicBool::new(true));
        let target = server.clone();
        let flapping = Arc::new(Flapping::default());
        let connected = Arc::clone(&flapping);
        let mut options = ConnectOptions::with_auth_callback(move |nonce| {
            let auth = login.auth(&nonce).map_err(|err| AuthError::new(format!("{err:#}")));
            std::future::ready(auth)
        })
        .name(name)
        .connection_timeout(CONNECT_TIMEOUT)
        .ping_interval(PING_INTERVAL)
        .client_capacity(CLIENT_CAPACITY)
        .subscription_capacity(SUBSCRIPTION_CAPACITY)
        .skip_subject_validation(true)
        .require_tls(self.tls)
        // async-nats sleeps a millisecond before its first attempt unless told the delay is zero.
        .reconnect_to_server_callback(move |_, _| {
            let first = first.swap(false, Ordering::Relaxed);
            let choice = first.then(|| ReconnectToServer { addr: target.clone(), delay: Some(Duration::ZERO) });
            std::future::ready(choice)
        })
        .reconnect_delay_callback(move |attempts| {
            let short_lives = flapping.count(attempts);
            reconnect_delay(short_lives * server_count + attempts, server_count, random())
        })
        .event_callback(move |event| {
            if event == Event::Connected {
                connected.connected();
            }
            on_event(event);
            std::future::ready(())
        });
        if self.tls_first {
            options = options.tls_first();
        }
        if let Some(file) = &self.tls_ca {
            options = options.add_root_certificates(file.clone());
        }
        if let Some((certificate, key)) = &self.tls_client {
            options = options.add_client_certificate(certificate.clone(), key.clone());
        }
        if let Some(prefix) = &self.inbox_prefix {
            options = options.custom_inbox_prefix(prefix);
        }
        options.connect(self.servers_from(server)).await
    }

    fn servers_from(&self, first: &ServerAddr) -> Vec<ServerAddr> {
        let others = self.servers.iter().filter(|server| *server != first);
        std::iter::once(first).chain(others).cloned().collect()
    }

    /// The JetStream API in the configured domain or behind the configured prefix.
    ///
    /// Requests and PubAcks wait at most `timeout`.
    pub fn jetstream(&self, client: Client, timeout: Duration) -> Context {
        ContextBuilder::new().timeout(timeout).api_prefix(self.api.clone()).build(client)
    }

    fn tls_first_hint(&self) -> &'static str {
        if self.tls_first { "" } else { "; if the server wants TLS first, add --tls-first" }
    }

    /// Turns what async-nats says into whether it is worth another attempt, and what to look at if not.
    fn explain(&self, server: &ServerAddr, err: &async_nats::ConnectError) -> ConnectError {
        let url = shown(server);
        let away = |reason: String| ConnectError::Away { url: url.clone(), reason };
        let refused = |reason: String| ConnectError::Refused { url: url.clone(), reason };
        match err.kind() {
            ConnectErrorKind::AuthorizationViolation => refused(self.login.refused()),
            ConnectErrorKind::Authentication | ConnectErrorKind::ServerParse | ConnectErrorKind::Tls => {
                refused(innermost(err))
            }
            ConnectErrorKind::TimedOut => {
                away(format!("no answer within {} s{}", CONNECT_TIMEOUT.as_secs(), self.tls_first_hint()))
            }
            ConnectErrorKind::Dns => away(format!("cannot find {}: {}", server.host(), innermost(err))),
            ConnectErrorKind::MaxReconnects => away(err.to_string()),
            ConnectErrorKind::Io => {
                if let Some(tls) = find::<rustls::Error>(err) {
                    return refused(explain_tls(tls, self.tls_client.is_some()));
                }
                match find::<ServerError>(err) {
                    Some(err) if is_refusal(err) => refused(format!("{}; {}", plain(err), self.login.flags())),
                    Some(err) => away(plain(err)),
                    None => {
                        let reason = innermost(err);
                        // A server that waits for TLS hangs up in the end instead of introducing itself.
                        let hint = if reason.contains("expected INFO") { self.tls_first_hint() } else { "" };
                        away(reason + hint)
                    }
                }
            }
        }
    }
}

/// The reason, if `event` means that the server no longer lets us in or does not allow what we ask.
///
/// On a living connection the server sends an error and closes (`ServerError`, such as expired or revoked
/// credentials); a refused reconnect comes as a `ClientError` with nothing but the text "authorization violation".
/// Both go on being retried. A permission that is missing also arrives here and only here: the request itself
/// just times out.
pub fn refusal(event: &Event) -> Option<String> {
    match event {
        Event::ServerError(err) if is_refusal(err) => Some(plain(err)),
        Event::ClientError(async_nats::ClientError::Other(text))
            if *text == ConnectErrorKind::AuthorizationViolation.to_string()
                || *text == ConnectErrorKind::Authentication.to_string() =>
        {
            Some(text.clone())
        }
        _ => None,
    }
}

/// Tells the user of a command on a terminal that the server does not allow what was asked: see [`refusal`].
/// The same reason is not told twice in a row.
pub(crate) fn warn_if_refused() -> impl Fn(Event) + Clone + Send + Sync + 'static {
    let last = Arc::new(Mutex::new(String::new()));
    move |event| {
        let Some(reason) = refusal(&event) else { return };
        let mut last = last.lock().unwrap_or_else(PoisonError::into_inner);
        if *last != reason {
            // Without a standard error there is nobody to tell.
            let _ = writeln!(io::stderr(), "warning: the server refuses: {reason}");
            *last = reason;
        }
    }
}

/// What the server said, without the prefix that async-nats puts before it.
fn plain(err: &ServerError) -> String {
    let text = err.to_string();
    text.strip_prefix("nats: ").unwrap_or(&text).to_owned()
}

fn is_refusal(err: &ServerError) -> bool {
    const REFUSALS: [&str; 6] = [
        "authorization violation",
        "authentication expired",
        "authentication revoked",
        "permissions violation",
        "account authentication",
        "tls required",
    ];
    let text = err.to_string().to_lowercase();
    REFUSALS.iter().any(|refusal| text.contains(refusal))
}

/// Asks whether JetStream is there and usable.
///
/// Needs permission for the API's `INFO` request. A server that refuses the request outright does not answer
/// it, so this can take the context's whole timeout.
///
/// # Errors
/// A server or an account without JetStream, no permission, no answer; each with its remedy.
pub async fn check_jetstream(jetstream: &Context) -> Result<()> {
    // Not `query_account`: it cannot read the answer of a 2.9 server.
    match jetstream.request("INFO", &json!({})).await {
        Ok(Response::Ok::<Value>(_)) => Ok(()),
        Ok(Response::Err { error }) => Err(match error.error_code() {
            ErrorCode::JETSTREAM_NOT_ENABLED => {
                anyhow!("the NATS server has no JetStream; start it with `nats-server -js`")
            }
            ErrorCode::JETSTREAM_NOT_ENABLED_FOR_ACCOUNT => anyhow!(
                "JetStream is not enabled for this account; enable it in the server's configuration \
                 (`jetstream: enabled` in the account) or log in to another one"
            ),
            _ => anyhow!("ask JetStream about this account: {error}"),
        }),
        Err(err) => Err(match err.kind() {
            // Nobody listens on the API's subjects: either the server or this domain has none.
            RequestErrorKind::NoResponders => anyhow!(
                "the NATS server has no JetStream; start it with `nats-server -js`, or look at --js-domain and \
                 --js-api-prefix"
            ),
            RequestErrorKind::TimedOut => anyhow!(
                "no answer from JetStream; if the server runs, this user may lack permission to publish to \
                 `$JS.API.>` or to subscribe to its inbox (see --inbox-prefix)"
            ),
            _ => anyhow!("ask JetStream about this account: {}", innermost(&err)),
        }),
    }
}

/// Makes a short-lived consumer that reads `stream` in its order.
///
/// # Errors
/// No such stream, no permission, no JetStream, no answer; each with its remedy.
pub(crate) async fn read_stream(
    jetstream: &Context,
    stream: &str,
    config: OrderedConfig,
) -> Result<Consumer<OrderedConfig>> {
    let err = match jetstream.create_consumer_on_stream(config, stream).await {
        Ok(consumer) => return Ok(consumer),
        Err(err) => err,
    };
    match err.kind() {
        ConsumerErrorKind::JetStream(err) if err.error_code() == ErrorCode::STREAM_NOT_FOUND => {
            bail!("no stream {stream}; `host provision` makes it")
        }
        ConsumerErrorKind::TimedOut => bail!(
            "read stream {stream}: no answer; if the server runs, this user may lack permission to create a consumer \
             or to subscribe to its inbox (see --inbox-prefix)"
        ),
        kind => {
            // No JetStream at all explains more than the consumer it does not have.
            check_jetstream(jetstream).await?;
            match kind {
                ConsumerErrorKind::JetStream(err) => bail!("read stream {stream}: {err}"),
                _ => bail!("read stream {stream}: {}", innermost(&err)),
            }
        }
    }
}

/// Who we are to the server.
#[derive(Debug, PartialEq, Eq)]
enum Login {
    Nobody,
    User { user: String, password: Source },
    Token(Source),
    Nkey(PathBuf),
    Creds(PathBuf),
}

#[derive(Debug, PartialEq, Eq)]
enum Source {
    Given(Secret),
    File(PathBuf),
}

impl Login {
    /// What to tell the server that sent `nonce`. Reads the files, a few hundred bytes, at every call.
    fn auth(&self, nonce: &[u8]) -> Result<Auth> {
        let mut auth = Auth::new();
        match self {
            Self::Nobody => {}
            Self::User { user, password } => {
                auth.username = Some(user.clone());
                auth.password = Some(password.read("--password-file")?);
            }
            Self::Token(token) => auth.token = Some(token.read("--token-file")?),
            Self::Nkey(file) => {
                let seed = read(file, "--nkey-file")?;
                // A seed file may carry comments; the seed is the line that looks like one.
                let seed = seed.lines().map(str::trim).find(|line| line.starts_with('S')).unwrap_or_default();
                let pair = nkeys::KeyPair::from_seed(seed)
                    .map_err(|err| anyhow!("--nkey-file {}: no nkey seed (`SU…`): {err}", file.display()))?;
                auth.nkey = Some(pair.public_key());
                auth.signature = Some(pair.sign(nonce).map_err(|err| anyhow!("sign the server's nonce: {err}"))?);
            }
            Self::Creds(file) => {
                let text = read(file, "--creds")?;
                let (jwt, seed) = credentials(&text)
                    .with_context(|| format!("--creds {}: not a credentials file", file.display()))?;
                let pair = nkeys::KeyPair::from_seed(seed)
                    .map_err(|err| anyhow!("--creds {}: no nkey seed in it: {err}", file.display()))?;
                auth.jwt = Some(jwt.to_owned());
                auth.signature = Some(pair.sign(nonce).map_err(|err| anyhow!("sign the server's nonce: {err}"))?);
            }
        }
        Ok(auth)
    }

    fn refused(&self) -> String {
        match self {
            Self::Nobody => {
                "the server wants a login; give one with --creds, --user, --token-file or --nkey-file".to_owned()
            }
            Self::User { user, .. } => {
                format!("the server refuses user {user}; look at --user and --password-file")
            }
            Self::Token(_) => "the server refuses the token; look at --token-file".to_owned(),
            Self::Nkey(file) => format!("the server refuses the nkey in {}; look at --nkey-file", file.display()),
            Self::Creds(file) => {
                format!("the server refuses the credentials in {}; look at --creds", file.display())
            }
        }
    }

    fn flags(&self) -> &'static str {
        match self {
            Self::Nobody => "look at --creds, --user, --token-file and --nkey-file",
            Self::User { .. } => "look at --user and --password-file",
            Self::Token(_) => "look at --token-file",
            Self::Nkey(_) => "look at --nkey-file",
            Self::Creds(_) => "look at --creds",
        }
    }
}

impl Source {
    fn read(&self, flag: &str) -> Result<String> {
        match self {
            Self::Given(secret) => Ok(secret.reveal().to_owned()),
            Self::File(file) => Ok(read(file, flag)?.trim_end_matches(['\r', '\n']).to_owned()),
        }
    }
}

fn read(file: &Path, flag: &str) -> Result<String> {
    std::fs::read_to_string(file).with_context(|| format!("read {flag} {}", file.display()))
}

/// The JWT and the seed of a credentials file: the first line inside each of its two `-----BEGIN …` blocks.
fn credentials(text: &str) -> Option<(&str, &str)> {
    let mut lines = text.lines().map(str::trim).filter(|line| !line.is_empty());
    let mut block = |name: &str| {
        lines.by_ref().find(|line| line.starts_with("---") && line.contains("BEGIN") && line.contains(name))?;
        lines.next()
    };
    let jwt = block("JWT")?;
    let seed = block("SEED")?;
    Some((jwt, seed))
}

/// A server's address without its login, and the login. async-nats itself ignores a login in the URL.
fn server(url: &str) -> Result<(ServerAddr, Login)> {
    let url = url.trim();
    // A URL that cannot be read may still hold a password, so only what follows it is shown.
    let safe = url.rsplit('@').next().unwrap_or_default();
    let address: ServerAddr =
        url.parse().map_err(|err: io::Error| anyhow!("--server {safe}: {}", innermost(&err).to_lowercase()))?;
    ensure!(!address.is_websocket(), "--server {safe}: WebSocket is not supported; use nats:// or tls://");
    ensure!(!address.host().is_empty(), "--server {safe}: no host name; write nats://HOST:4222");
    let login = match (address.username(), address.password()) {
        (Some(user), Some(password)) => {
            Login::User { user: percent_decoded(user), password: Source::Given(Secret(percent_decoded(password))) }
        }
        (Some(token), None) => Login::Token(Source::Given(Secret(percent_decoded(token)))),
        _ => Login::Nobody,
    };
    let mut bare = address.into_inner();
    // These only fail for a URL without a host, which was refused above.
    let _ = bare.set_password(None);
    let _ = bare.set_username("");
    Ok((ServerAddr::from_url(bare)?, login))
}

/// Checks that the certificate and the key can be read and belong together.
fn check_pair(certificate: &Path, key: &Path) -> Result<()> {
    let chain = CertificateDer::pem_file_iter(certificate)
        .and_then(|certificates| certificates.collect::<Result<Vec<_>, _>>())
        .map_err(|err| anyhow!("read --tls-cert {}: {err}", certificate.display()))?;
    ensure!(!chain.is_empty(), "--tls-cert {}: no certificate in this file", certificate.display());
    let private =
        PrivateKeyDer::from_pem_file(key).map_err(|err| anyhow!("read --tls-key {}: {err}", key.display()))?;
    rustls::ClientConfig::builder()
        .with_root_certificates(rustls::RootCertStore::empty())
        .with_client_auth_cert(chain, private)
        .map_err(|err| {
            anyhow!("--tls-cert {} and --tls-key {} do not fit together: {err}", certificate.display(), key.display())
        })?;
    Ok(())
}

fn percent_decoded(text: &str) -> String {
    let mut bytes = Vec::with_capacity(text.len());
    let mut rest = text.as_bytes();
    while let Some((&byte, after)) = rest.split_first() {
        let code = after.get(..2).filter(|_| byte == b'%').and_then(|hex| str::from_utf8(hex).ok());
        match code.and_then(|hex| u8::from_str_radix(hex, 16).ok()) {
            Some(decoded) => {
                bytes.push(decoded);
                rest = &after[2..];
            }
            None => {
                bytes.push(byte);
                rest = after;
            }
        }
    }
    String::from_utf8_lossy(&bytes).into_owned()
}

/// `scheme://host:port`, with brackets around an IPv6 address.
fn shown(server: &ServerAddr) -> String {
    let (scheme, host, port) = (server.scheme(), server.host(), server.port());
    if host.contains(':') { format!("{scheme}://[{host}]:{port}") } else { format!("{scheme}://{host}:{port}") }
}

fn explain_tls(err: &rustls::Error, has_certificate: bool) -> String {
    use rustls::{AlertDescription, CertificateError, Error};
    let remedy = match err {
        Error::InvalidCertificate(CertificateError::UnknownIssuer) => {
            "name the file of the authority that signed it with --tls-ca"
        }
        Error::InvalidCertificate(
            CertificateError::NotValidForName | CertificateError::NotValidForNameContext { .. },
        ) => "use the host name that the server's certificate is for in --server",
        Error::InvalidCertificate(_) => "look at the server's certificate and --tls-ca",
        Error::AlertReceived(AlertDescription::CertificateRequired | AlertDescription::BadCertificate)
            if !has_certificate =>
        {
            "the server wants a certificate; give one with --tls-cert and --tls-key"
        }
        Error::AlertReceived(_) if has_certificate => "look at --tls-cert and --tls-key",
        Error::AlertReceived(_) => "look at --tls-cert, --tls-key and the server's own log",
        Error::InvalidMessage(_) => "the server does not answer in TLS; leave out --tls and --tls-first",
        _ => "look at the --tls flags",
    };
    format!("TLS: {err}; {remedy}")
}

/// How long to wait before attempt number `attempts` (from 1) since the last success.
///
/// async-nats counts every server of the pool as one attempt, so a round over all of them shares one delay.
fn reconnect_delay(attempts: usize, servers: usize, random: u64) -> Duration {
    let round = attempts.saturating_sub(1) / servers.max(1);
    let (fixed, jitter) = match round {
        // A server that went away took all its clients with it: they must not come back in the same instant.
        0 => (Duration::ZERO, RECONNECT_DELAY_FIRST),
        _ => {
            let doubling = 1_u32 << (round - 1).min(16);
            let delay = RECONNECT_DELAY_FIRST.saturating_mul(doubling).min(RECONNECT_DELAY_MAX);
            (delay / 2, delay / 2)
        }
    };
    #[expect(clippy::cast_precision_loss, reason = "a random fraction needs no more than a float's precision")]
    let fraction = random as f64 / u64::MAX as f64;
    fixed + jitter.mul_f64(fraction)
}

/// Counts connections that ended right after they were made, as with a user that has just expired: async-nats forgets
/// its failed attempts at every success and would come back at once, again and again.
#[derive(Debug, Default)]
struct Flapping(Mutex<(Option<Instant>, usize)>);

impl Flapping {
    fn connected(&self) {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).0 = Some(Instant::now());
    }

    /// How many connections in a row were short-lived, asked before attempt number `attempts` (from 1).
    fn count(&self, attempts: usize) -> usize {
        let mut guard = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let (connected, count) = &mut *guard;
        if attempts == 1 {
            let is_short = connected.is_some_and(|since| since.elapsed() < SHORT_LIVED);
            *count = if is_short { *count + 1 } else { 0 };
        }
        *count
    }
}

/// Randomness good enough to spread clients in time, from the keys that the standard library draws for its maps.
fn random() -> u64 {
    RandomState::new().hash_one(0_u8)
}

/// The text of the error at the bottom of the chain: what happened, without the layers that passed it on.
pub(crate) fn innermost(err: &(dyn Error + 'static)) -> String {
    let mut err = err;
    while let Some(source) = err.source() {
        err = source;
    }
    err.to_string()
}

/// The first error of type `T` in the chain, also inside an [`io::Error`], which hides it from `source`.
pub(crate) fn find<'a, T: Error + 'static>(err: &'a (dyn Error + 'static)) -> Option<&'a T> {
    let mut next = Some(err);
    while let Some(err) = next {
        if let Some(found) = err.downcast_ref::<T>() {
            return Some(found);
        }
        if let Some(inner) = err.downcast_ref::<io::Error>().and_then(io::Error::get_ref)
            && let Some(found) = find::<T>(inner)
        {
            return Some(found);
        }
        next = err.source();
    }
    None
}

#[cfg(test)]
mod tests {
    use super::*;
    use clap::Parser;

    #[derive(Debug, Parser)]
    struct Command {
        #[command(flatten)]
        nats: NatsArgs,
    }

    fn resolve(args: &[&str]) -> Result<Nats> {
        let args = std::iter::once("test").chain(args.iter().copied());
        Command::try_parse_from(args)?.nats.resolve()
    }

    /// A login in the URL is used, and never shown.
    #[test]
    fn login_in_url_is_taken_out() {
        let cases = [
            ("nats://ann:p%40ss@example.com", "nats://example.com:4222", "ann", "p@ss"),
            ("ann:secret@example.com:4333", "nats://example.com:4333", "ann", "secret"),
            ("tls://ann:x@[::1]:4000", "tls://[::1]:4000", "ann", "x"),
        ];
        for (url, bare, user, password) in cases {
            let nats = resolve(&["-s", url]).expect(url);
            assert_eq!(nats.servers(), bare);
            let auth = nats.login.auth(b"").expect("auth");
            assert_eq!((auth.username.as_deref(), auth.password.as_deref()), (Some(user), Some(password)));
            assert!(!format!("{nats:?}").contains(password) || password == "x");
        }
        let token = resolve(&["-s", "nats://t0ken@example.com"]).expect("token");
        assert_eq!(token.login.auth(b"").expect("auth").token.as_deref(), Some("t0ken"));
    }

    #[test]
    fn options_that_contradict_each_other_are_refused() {
        let cases: [(&[&str], &str); 9] = [
            (&["--user", "ann"], "--password-file"),
            (&["--password", "x"], "--user"),
            (&["--user", "ann", "--password", "x", "--token", "y"], "cannot be used"),
            (&["--js-domain", "a", "--js-api-prefix", "b"], "cannot be used"),
            (&["--js-domain", "a.b"], "--js-domain"),
            (&["--tls-cert", "a"], "--tls-key"),
            (&["-s", "ws://example.com"], "WebSocket"),
            (&["-s", "http://ann:secret@example.com"], "scheme"),
            (&["-s", "nats://a:b@one,nats://c:d@two"], "different logins"),
        ];
        for (args, expected) in cases {
            let err = format!("{:#}", resolve(args).expect_err(expected));
            assert!(err.contains(expected), "{args:?}: {err}");
            assert!(!err.contains("secret"), "{err}");
        }
    }

    #[test]
    fn several_servers_come_from_commas_and_repeats() {
        let nats = resolve(&["-s", "one,two:1", "-s", "tls://three"]).expect("resolve");
        assert_eq!(nats.servers(), "nats://one:4222, nats://two:1, tls://three:4222");
    }

    #[test]
    fn any_tls_flag_requires_tls() {
        assert!(resolve(&["--tls-first"]).expect("resolve").tls);
        assert!(!resolve(&[]).expect("resolve").tls);
    }

    #[test]
    fn credentials_files_are_read() {
        let text = "-----BEGIN NATS USER JWT-----\neyJ0.a.b\n------END NATS USER JWT------\n\n\
                    *** secret ***\n-----BEGIN USER NKEY SEED-----\r\nSUABC\r\n------END USER NKEY SEED------\n";
        assert_eq!(credentials(text), Some(("eyJ0.a.b", "SUABC")));
        assert_eq!(credentials("-----BEGIN NATS USER JWT-----\neyJ0.a.b\n"), None);
    }

    #[test]
    fn reconnects_back_off_to_five_seconds() {
        let ms = |attempts, servers, random| reconnect_delay(attempts, servers, random).as_millis();
        assert_eq!(ms(1, 1, 0), 0);
        assert_eq!(ms(1, 1, u64::MAX), 50);
        assert_eq!(ms(2, 1, u64::MAX), 50);
        assert_eq!(ms(3, 1, u64::MAX), 100);
        assert_eq!(ms(3, 3, 0), 0);
        assert_eq!(ms(4, 3, 0), 25);
        assert_eq!(ms(1000, 1, u64::MAX), 5000);
        assert_eq!(ms(1000, 1, 0), 2500);
    }

    #[test]
    fn short_connections_add_up() {
        let flapping = Flapping::default();
        assert_eq!(flapping.count(1), 0);
        flapping.connected();
        assert_eq!((flapping.count(1), flapping.count(2)), (1, 1));
        flapping.connected();
        assert_eq!(flapping.count(1), 2);
    }

    #[test]
    fn lost_rights_are_told_from_trouble() {
        let server = |text: &str| Event::ServerError(ServerError::Other(text.into()));
        assert!(refusal(&server("User Authentication Expired")).is_some());
        assert!(refusal(&server("Permissions Violation for Publish to \"x\"")).is_some());
        assert!(refusal(&Event::ServerError(ServerError::AuthorizationViolation)).is_some());
        assert!(
            refusal(&Event::ClientError(async_nats::ClientError::Other("authorization violation".into()))).is_some()
        );
        assert!(refusal(&server("Stale Connection")).is_none());
        assert!(refusal(&Event::Disconnected).is_none());
    }
}
