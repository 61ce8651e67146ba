//! `host provision`: creates or checks the streams, the consumer and the bucket that the host works with.
//!
//! Settings are compared and changed as the JSON that the server speaks, one by one, so that a setting this program
//! has never heard of survives an update.

use crate::cli::counted;
use crate::names::{NameArgs, Names, check_bucket, check_pattern, covers, overlap};
use crate::nats::{NatsArgs, check_jetstream, warn_if_refused};
use crate::parking::{DUE_ACK_WAIT, DUE_CONSUMER};
use anyhow::{Context as _, Result, anyhow, bail, ensure};
use async_nats::jetstream::response::Response;
use async_nats::jetstream::stream::{DiscardPolicy, RetentionPolicy};
use async_nats::jetstream::{Context, ErrorCode, consumer, stream};
use clap::parser::ValueSource;
use clap::{ArgMatches, ValueEnum};
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value, json};
use std::collections::BTreeSet;
use std::fmt::{self, Write as _};
use std::process::ExitCode;
use std::time::{Duration, SystemTime};

/// How long the server may take to answer one request.
const REQUEST_TIMEOUT: Duration = Duration::from_secs(5);

/// What to create, as typed.
#[derive(Debug, clap::Args)]
#[command(after_help = "\
Examples:
  host provision                        create what is missing, with the defaults
  host provision --check                change nothing; exit code 1 if not all is as wanted
  host provision --update --ack-wait 1m change this setting of what exists, and no other
  host provision --stream ORDERS --subjects 'orders.>' --consumer triage-eu

What exists keeps every setting that no flag or variable is given for; the defaults are for what is created. Without
--update a difference is shown and left alone.")]
pub struct ProvisionArgs {
    #[command(flatten)]
    nats: NatsArgs,

    #[command(flatten)]
    names: NameArgs,

    #[command(flatten)]
    layout: LayoutArgs,

    /// Change nothing; exit with code 1 if anything is missing or differs
    #[arg(long, env = "MAILROOM_CHECK", value_parser = clap::builder::BoolishValueParser::new(), conflicts_with = "update", help_heading = "Mode")]
    check: bool,

    /// Bring what exists and differs to the settings that are given
    #[arg(long, env = "MAILROOM_UPDATE", value_parser = clap::builder::BoolishValueParser::new(), help_heading = "Mode")]
    update: bool,

    /// With --update: make a stream smaller though the server deletes messages then, verdicts or dead letters
    #[arg(long, env = "MAILROOM_ALLOW_LOSS", value_parser = clap::builder::BoolishValueParser::new(), help_heading = "Mode")]
    allow_loss: bool,

    /// Print the report as JSON
    #[arg(long, env = "MAILROOM_JSON", value_parser = clap::builder::BoolishValueParser::new(), help_heading = "Mode")]
    json: bool,
}

#[derive(Debug, clap::Args)]
#[command(next_help_heading = "Settings")]
struct LayoutArgs {
    // First, since reading the others takes them away.
    #[command(flatten)]
    given: Given,

    /// Subjects that the stream takes; separate several with commas or repeat the flag
    #[arg(long, value_name = "SUBJECT", env = "MAILROOM_SUBJECTS", value_delimiter = ',', default_value = "mail.>")]
    subjects: Vec<String>,

    /// Give the consumer only the messages on this subject; `>` for all [default: all of the stream]
    #[arg(long, value_name = "SUBJECT", env = "MAILROOM_FILTER")]
    filter: Option<String>,

    /// Key-value bucket for guests
    #[arg(long, value_name = "NAME", env = "MAILROOM_BUCKET", default_value = "triage")]
    bucket: String,

    /// Create no key-value bucket
    #[arg(long, env = "MAILROOM_NO_BUCKET", value_parser = clap::builder::BoolishValueParser::new())]
    no_bucket: bool,

    /// How long a message may stay unacknowledged before the server delivers it again. Must be longer than the
    /// deadline; the host extends it while a guest runs
    #[arg(
        long,
        value_name = "DURATION",
        env = "MAILROOM_ACK_WAIT",
        default_value = "30s",
        value_parser = humantime::parse_duration
    )]
    ack_wait: Duration,

    /// The deadline of `host run`, to check --ack-wait against
    #[arg(
        long,
        value_name = "DURATION",
        env = "MAILROOM_DEADLINE",
        default_value = "1s",
        value_parser = humantime::parse_duration
    )]
    deadline: Duration,

    /// How long the streams recognise a message id they have seen
    #[arg(
        long,
        value_name = "DURATION",
        env = "MAILROOM_DUPLICATE_WINDOW",
        default_value = "2m",
        value_parser = humantime::parse_duration
    )]
    duplicate_window: Duration,

    /// Messages that all hosts together may hold unacknowledged; those waiting for another attempt count too
    #[arg(
        long,
        value_name = "NUMBER",
        env = "MAILROOM_MAX_ACK_PENDING",
        default_value_t = 20_000,
        value_parser = clap::value_parser!(i64).range(1..)
    )]
    max_ack_pending: i64,

    /// How long messages are kept, triaged or not; 0: for ever
    #[arg(
        long,
        value_name = "DURATION",
        env = "MAILROOM_MAIL_MAX_AGE",
        default_value = "7d",
        value_parser = parse_age
    )]
    mail_max_age: Duration,

    /// How long verdicts are kept: at least as long as messages; 0: for ever
    #[arg(
        long,
        value_name = "DURATION",
        env = "MAILROOM_VERDICT_MAX_AGE",
        default_value = "7d",
        value_parser = parse_age
    )]
    verdict_max_age: Duration,

    /// How long dead letters are kept; 0: for ever
    #[arg(
        long,
        value_name = "DURATION",
        env = "MAILROOM_DEAD_MAX_AGE",
        default_value = "0",
        value_parser = parse_age
    )]
    dead_max_age: Duration,

    /// Largest size of the message stream, such as 10GiB; when it is full, publishers are refused. 0: no limit
    #[arg(long, value_name = "SIZE", env = "MAILROOM_MAIL_MAX_BYTES", default_value = "0", value_parser = parse_size)]
    mail_max_bytes: u64,

    /// Largest size of the verdict stream; when it is full, the host waits. 0: no limit
    #[arg(
        long,
        value_name = "SIZE",
        env = "MAILROOM_VERDICT_MAX_BYTES",
        default_value = "0",
        value_parser = parse_size
    )]
    verdict_max_bytes: u64,

    /// Largest size of the dead-letter stream; when it is full, its messages stay where they are. 0: no limit
    #[arg(long, value_name = "SIZE", env = "MAILROOM_DEAD_MAX_BYTES", default_value = "0", value_parser = parse_size)]
    dead_max_bytes: u64,

    /// Largest size of the bucket; when it is full, guests' writes fail. 0: no limit
    #[arg(
        long,
        value_name = "SIZE",
        env = "MAILROOM_BUCKET_MAX_BYTES",
        default_value = "0",
        value_parser = parse_size
    )]
    bucket_max_bytes: u64,

    /// Where the server keeps all of it; memory is lost when the server stops
    #[arg(long, env = "MAILROOM_STORAGE", default_value = "file")]
    storage: Storage,

    /// Servers of a cluster that each keep a copy
    #[arg(
        long,
        value_name = "NUMBER",
        env = "MAILROOM_REPLICAS",
        default_value_t = 1,
        value_parser = clap::value_parser!(u8).range(1..=5)
    )]
    replicas: u8,
}

/// Which arguments were given, on the command line or in the environment: the others have their defaults.
#[derive(Debug, Clone, Default)]
pub struct Given(BTreeSet<String>);

impl Given {
    fn has(&self, argument: &str) -> bool {
        self.0.contains(argument)
    }
}

impl clap::FromArgMatches for Given {
    fn from_arg_matches(matches: &ArgMatches) -> Result<Self, clap::Error> {
        let mut given = Self::default();
        given.update_from_arg_matches(matches)?;
        Ok(given)
    }

    fn update_from_arg_matches(&mut self, matches: &ArgMatches) -> Result<(), clap::Error> {
        let is_given = |id: &&clap::Id| {
            matches.value_source(id.as_str()).is_some_and(|source| source != ValueSource::DefaultValue)
        };
        self.0 = matches.ids().filter(is_given).map(ToString::to_string).collect();
        Ok(())
    }
}

/// It has no arguments of its own.
impl clap::Args for Given {
    fn augment_args(command: clap::Command) -> clap::Command {
        command
    }

    fn augment_args_for_update(command: clap::Command) -> clap::Command {
        command
    }
}

/// Where the server keeps a stream.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Storage {
    /// On disk
    File,
    /// In memory
    Memory,
}

/// What should be there, as meant.
#[derive(Debug, Clone)]
pub struct Layout {
    /// What everything is called.
    pub names: Names,
    /// Which of the settings are wanted of what exists, too; the others are for what is created.
    pub given: Given,
    /// Subjects of the message stream.
    pub subjects: Vec<String>,
    /// The consumer's filter; `None` for all of the stream.
    pub filter: Option<String>,
    /// The guests' bucket; `None` for none.
    pub bucket: Option<String>,
    /// When the server delivers an unacknowledged message again.
    pub ack_wait: Duration,
    /// The most a guest may take.
    pub deadline: Duration,
    /// How long the streams recognise message ids.
    pub duplicate_window: Duration,
    /// Unacknowledged messages of all hosts together.
    pub max_ack_pending: i64,
    /// How long messages are kept; zero for ever.
    pub mail_max_age: Duration,
    /// How long verdicts are kept; zero for ever.
    pub verdict_max_age: Duration,
    /// How long dead letters are kept; zero for ever.
    pub dead_max_age: Duration,
    /// Size limits of mail, verdicts, dead letters and bucket, in bytes; zero for none.
    pub max_bytes: [u64; 4],
    /// Where it is kept.
    pub storage: Storage,
    /// Copies in a cluster.
    pub replicas: u8,
}

impl Layout {
    /// The defaults, under these names: what `host provision` makes when told nothing else.
    pub fn new(names: Names) -> Self {
        const DAY: Duration = Duration::from_secs(24 * 60 * 60);
        Self {
            names,
            given: Given::default(),
            subjects: vec!["mail.>".into()],
            filter: None,
            bucket: Some("triage".into()),
            ack_wait: Duration::from_secs(30),
            deadline: Duration::from_secs(1),
            duplicate_window: Duration::from_secs(120),
            max_ack_pending: 20_000,
            mail_max_age: 7 * DAY,
            verdict_max_age: 7 * DAY,
            dead_max_age: Duration::ZERO,
            max_bytes: [0; 4],
            storage: Storage::File,
            replicas: 1,
        }
    }

    /// Checks the settings that are given, and against each other; asks no server. Those that are not given may be
    /// others on the server.
    ///
    /// # Errors
    /// Settings that could lose a message or give it two verdicts, and ones the server would not take; each names
    /// its flags.
    pub fn check(&self) -> Result<()> {
        ensure!(!self.subjects.is_empty(), "--subjects is empty");
        for subject in &self.subjects {
            check_pattern("--subjects", subject)?;
            for (flag, other) in
                [("--verdict-subject", self.names.verdict_wildcard()), ("--dead-subject", self.names.dead_wildcard())]
            {
                ensure!(
                    !overlap(subject, &other),
                    "--subjects {subject} overlaps {other} of {flag}; a subject can be in one stream only"
                );
            }
            let replays = self.names.replay_wildcard();
            ensure!(
                !overlap(subject, &replays),
                "--subjects {subject} overlaps {replays} of --replay-subject, which is for operators only and added by \
                 itself"
            );
        }
        if let Some(filter) = &self.filter {
            check_pattern("--filter", filter)?;
        }
        if let Some(bucket) = &self.bucket {
            check_bucket("--bucket", bucket)?;
        }
        let show = humantime::format_duration;
        ensure!(
            !self.given.has("ack_wait") || self.ack_wait > self.deadline,
            "--ack-wait {} must be longer than --deadline {}: the server would deliver messages again that are still \
             being worked on",
            show(self.ack_wait),
            show(self.deadline)
        );
        ensure!(
            self.duplicate_window >= Duration::from_millis(100),
            "--duplicate-window {} is too short; at least 100ms",
            show(self.duplicate_window)
        );
        Ok(())
    }
}

impl Layout {
    /// A setting that a flag gives.
    fn setting(&self, name: &'static str, flag: &'static str, value: Value) -> Setting {
        let lasting = self.given.has(&flag.trim_start_matches('-').replace('-', "_"));
        Setting { name, value, flag, lasting }
    }
}

impl LayoutArgs {
    fn resolve(self, names: Names) -> Result<Layout> {
        let layout = Layout {
            names,
            given: self.given,
            subjects: self.subjects,
            filter: self.filter.filter(|filter| filter != ">"),
            bucket: (!self.no_bucket).then_some(self.bucket),
            ack_wait: self.ack_wait,
            deadline: self.deadline,
            duplicate_window: self.duplicate_window,
            max_ack_pending: self.max_ack_pending,
            mail_max_age: self.mail_max_age,
            verdict_max_age: self.verdict_max_age,
            dead_max_age: self.dead_max_age,
            max_bytes: [self.mail_max_bytes, self.verdict_max_bytes, self.dead_max_bytes, self.bucket_max_bytes],
            storage: self.storage,
            replicas: self.replicas,
        };
        layout.check()?;
        Ok(layout)
    }
}

impl ProvisionArgs {
    /// Connects, does what was asked and prints the report.
    ///
    /// # Errors
    /// No connection, no JetStream, settings that are refused. What merely differs is in the report and the exit
    /// code.
    pub async fn execute(self) -> Result<ExitCode> {
        let layout = self.layout.resolve(self.names.resolve()?)?;
        let nats = self.nats.resolve()?;
        let mode = match (self.check, self.update, self.allow_loss) {
            (true, _, _) => Mode::Check,
            (_, true, allow_loss) => Mode::Update { allow_loss },
            _ => Mode::Create,
        };
        let client = nats.connect("mailroom provision", warn_if_refused()).await?;
        let jetstream = nats.jetstream(client, REQUEST_TIMEOUT);
        let report = provision(&jetstream, &layout, mode).await?;
        let text = if self.json { serde_json::to_string(&report)? + "\n" } else { report.to_string() };
        crate::cli::print(&text)?;
        if !report.unsafe_settings.is_empty() {
            bail!("{}", report.unsafe_settings.join("\n       "));
        }
        Ok(if mode == Mode::Check && !report.as_wanted() { ExitCode::FAILURE } else { ExitCode::SUCCESS })
    }
}

/// What [`provision`] may do.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Mode {
    /// Create what is missing, leave what differs.
    Create,
    /// Create what is missing, change what differs; make a stream too small for what it holds only if that is allowed.
    Update { allow_loss: bool },
    /// Only look.
    Check,
}

/// What [`provision`] found and did.
#[derive(Debug, Serialize)]
pub struct Report {
    /// The streams, the consumer and the bucket, in the order they were looked at.
    pub things: Vec<Thing>,
    /// What must be changed before `host run` may use this; empty if nothing, or if something is missing.
    #[serde(rename = "unsafe")]
    pub unsafe_settings: Vec<String>,
}

/// One stream, consumer or bucket.
#[derive(Debug, Serialize)]
pub struct Thing {
    /// `stream`, `consumer` or `bucket`.
    pub kind: &'static str,
    /// Its name; a consumer's with its stream: `MAIL/triage`.
    pub name: String,
    /// What it is like now.
    pub state: State,
    /// What differs, or differed before an update.
    pub differences: Vec<Difference>,
    /// What it is for, in a few words.
    pub about: String,
}

/// How a thing compares with what was asked for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum State {
    /// It was missing and is there now.
    Created,
    /// It is there, with the settings asked for.
    AsWanted,
    /// It is there, with other settings.
    Differs,
    /// It is not there.
    Missing,
    /// It had other settings and now has the ones asked for.
    Updated,
}

/// A setting that is not as asked for.
#[derive(Debug, Serialize)]
pub struct Difference {
    /// The setting, as NATS calls it.
    pub setting: &'static str,
    /// What the server has.
    pub have: String,
    /// What was asked for.
    pub want: String,
}

impl Report {
    /// Whether everything is there and as asked for.
    pub fn as_wanted(&self) -> bool {
        self.things.iter().all(|thing| !matches!(thing.state, State::Missing | State::Differs))
    }
}

impl fmt::Display for State {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(match self {
            Self::Created => "created",
            Self::AsWanted => "as wanted",
            Self::Differs => "differs",
            Self::Missing => "missing",
            Self::Updated => "updated",
        })
    }
}

impl fmt::Display for Report {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let width = self.things.iter().map(|thing| thing.name.chars().count()).max().unwrap_or(0);
        for thing in &self.things {
            let mut lines = thing.differences.iter().map(|difference| {
                let Difference { setting, have, want } = difference;
                let verb = if thing.state == State::Updated { ("was", "is") } else { ("have", "want") };
                format!("{setting}: {} {have}, {} {want}", verb.0, verb.1)
            });
            let first = lines.next().unwrap_or_else(|| thing.about.clone());
            writeln!(f, "{:<8}  {:<width$}  {:<9}  {first}", thing.kind, thing.name, thing.state)?;
            for line in lines {
                writeln!(f, "{:<8}  {:<width$}  {:<9}  {line}", "", "", "")?;
            }
        }
        let has = |state| self.things.iter().any(|thing| thing.state == state);
        if has(State::Differs) {
            writeln!(f, "\nWhat differs was left alone; the same with --update changes it.")?;
        }
        if has(State::Missing) {
            writeln!(f, "\nNothing was created; `host provision` without --check does that.")?;
        }
        Ok(())
    }
}

/// Creates, updates or checks everything in `layout`.
///
/// Doing it twice changes nothing the second time. No stream is ever deleted, nor a message unless that is allowed.
///
/// # Errors
/// Settings that contradict each other, what would become unsafe or lose messages, no JetStream, whatever the server
/// refuses. What was done before stays; run it again. Existing settings that are unsafe are no error here but in the
/// report.
pub async fn provision(jetstream: &Context, layout: &Layout, mode: Mode) -> Result<Report> {
    layout.check()?;
    check_jetstream(jetstream).await?;
    let server = Server {
        many_filters: jetstream.client().is_server_compatible(2, 10, 0),
        schedules: jetstream.client().is_server_compatible(2, 12, 0),
    };
    let mut plans = Vec::new();
    for wanted in Wanted::all(layout, server) {
        let found = wanted.find(jetstream).await.with_context(|| format!("look for {}", wanted.what()))?;
        plans.push(wanted.plan(found, mode));
    }
    if plans.iter().any(|plan| plan.action != Action::None) {
        let wrong = unsafe_plan(&plans, layout)?;
        ensure!(wrong.is_empty(), "nothing was changed, since this would be unsafe: {}", wrong.join("; "));
        for plan in &plans {
            plan.check(mode)?;
        }
    }
    let mut report = Report { things: Vec::new(), unsafe_settings: Vec::new() };
    for plan in &mut plans {
        report.things.push(plan.carry_out(jetstream).await?);
    }
    report.unsafe_settings = unsafe_plan(&plans, layout)?;
    Ok(report)
}

/// What keeps a host from working safely with this, if all is there that it takes.
fn unsafe_plan(plans: &[Plan], layout: &Layout) -> Result<Vec<String>> {
    // In the order of `Wanted::all`.
    let [_, mail, consumer, verdicts, ..] = plans else { return Ok(Vec::new()) };
    let config = |plan: &Plan| plan.config.clone().map(Value::Object);
    let (Some(mail), Some(consumer), Some(verdicts)) = (config(mail), config(consumer), config(verdicts)) else {
        return Ok(Vec::new());
    };
    let read = "read the server's answer";
    let mail: stream::Config = serde_json::from_value(mail).context(read)?;
    let mut wrong = unsafe_settings(
        &mail,
        &serde_json::from_value(consumer).context(read)?,
        &serde_json::from_value(verdicts).context(read)?,
        layout.deadline,
    );
    if let Some(filter) = &layout.filter
        && !mail.subjects.iter().any(|subject| overlap(subject, filter))
    {
        wrong.push(format!(
            "--filter {filter} matches none of the subjects {} of stream {}; the consumer would get nothing",
            mail.subjects.join(", "),
            mail.name
        ));
    }
    Ok(wrong)
}

/// What keeps a host from working safely with these: each entry names the thing, the setting and the remedy.
///
/// Safe means that no message is lost silently or gets two verdicts, whatever dies when.
pub fn unsafe_settings(
    mail: &stream::Config,
    consumer: &consumer::Config,
    verdicts: &stream::Config,
    deadline: Duration,
) -> Vec<String> {
    let mut found = Vec::new();
    let show = humantime::format_duration;
    let name = consumer.durable_name.as_ref().or(consumer.name.as_ref()).map_or("", String::as_str);
    let consumer_name = format!("consumer {name} of stream {}", mail.name);

    if consumer.deliver_subject.is_some() {
        found.push(format!(
            "{consumer_name} is a push consumer, which cannot hold messages back; delete it and run `host provision`"
        ));
    }
    if consumer.ack_policy != consumer::AckPolicy::Explicit {
        found.push(format!(
            "{consumer_name} has ack policy {:?}: messages would count as done before their verdict is stored; \
             delete it and run `host provision`",
            consumer.ack_policy
        ));
    }
    if consumer.max_deliver > 0 {
        found.push(format!(
            "{consumer_name} has max_deliver {}: the server would give up on messages silently; \
             run `host provision --update` to make it -1",
            consumer.max_deliver
        ));
    }
    let ack_wait = consumer.backoff.iter().min().copied().unwrap_or(consumer.ack_wait);
    if ack_wait <= deadline {
        let setting = if consumer.backoff.is_empty() { "ack_wait" } else { "back-off" };
        found.push(format!(
            "{consumer_name} has {setting} {}, not longer than the deadline of {}: messages would be delivered again \
             while they are worked on; lower --deadline, or run `host provision --update --ack-wait {}`",
            show(ack_wait),
            show(deadline),
            as_typed(advised_ack_wait(deadline))
        ));
    }
    if consumer.headers_only {
        found.push(format!("{consumer_name} delivers headers only, no mail; delete it and run `host provision`"));
    }
    if !verdicts.max_age.is_zero() && (mail.max_age.is_zero() || verdicts.max_age < mail.max_age) {
        found.push(format!(
            "stream {} keeps verdicts for {}, stream {} keeps messages {}: a message delivered again could get a \
             second verdict; run `host provision --update` with `--verdict-max-age {}`",
            verdicts.name,
            show(verdicts.max_age),
            mail.name,
            if mail.max_age.is_zero() { "for ever".into() } else { format!("for {}", show(mail.max_age)) },
            as_typed(mail.max_age)
        ));
    }
    if verdicts.retention != RetentionPolicy::Limits {
        found.push(format!(
            "stream {} has retention {:?}: verdicts go when somebody has read them, and a message delivered again \
             could get a second one; recreate it with retention limits",
            verdicts.name, verdicts.retention
        ));
    }
    if verdicts.discard == DiscardPolicy::Old && (verdicts.max_messages > 0 || verdicts.max_bytes > 0) {
        found.push(format!(
            "stream {} throws old verdicts away when it is full (discard old with max_msgs {}, max_bytes {}); \
             run `host provision --update` to make it discard new",
            verdicts.name, verdicts.max_messages, verdicts.max_bytes
        ));
    }
    if verdicts.no_ack {
        found.push(format!(
            "stream {} does not acknowledge what it stores (no_ack), so that no message could ever be done; recreate \
             it without",
            verdicts.name
        ));
    }
    found
}

/// The `ack_wait` that suits a deadline: the default, or twice as long.
fn advised_ack_wait(deadline: Duration) -> Duration {
    Duration::from_secs(30).max(deadline.saturating_mul(2))
}

/// What the server can do that older ones cannot.
#[derive(Clone, Copy)]
struct Server {
    /// Take a list of filters; others ignore it, and such a consumer would get all of the stream.
    many_filters: bool,
    /// Publish messages at a time that they name.
    schedules: bool,
}

/// A stream, consumer or bucket as it should be.
struct Wanted {
    kind: &'static str,
    shown_name: String,
    /// What a bucket is for; streams and consumers tell by their settings.
    about: Option<&'static str>,
    /// API subjects to ask, create and update with.
    info: String,
    create: String,
    update: String,
    settings: Vec<Setting>,
    /// Subjects that an existing stream, or filters that an existing consumer with a filter must have.
    must_take: Vec<String>,
    /// A source that an existing stream must have.
    must_source: Option<Value>,
    /// A consumer's stream: then the configuration is wrapped.
    of_stream: Option<String>,
}

/// A setting, as NATS calls it.
#[derive(Clone)]
struct Setting {
    name: &'static str,
    value: Value,
    /// With which flag it is set, if with any.
    flag: &'static str,
    /// Whether it is wanted of what exists, too, or for its creation only.
    lasting: bool,
}

impl Setting {
    /// One that what exists has to have, too.
    fn always(name: &'static str, value: Value) -> Self {
        Self { name, value, flag: "", lasting: true }
    }

    /// One for the creation only.
    fn at_first(name: &'static str, value: Value) -> Self {
        Self { name, value, flag: "", lasting: false }
    }
}

impl Wanted {
    /// Everything in the layout: the stream of parked retries, which the message stream may have among its sources,
    /// message stream, consumer, verdict stream, dead-letter stream, perhaps the bucket.
    fn all(layout: &Layout, server: Server) -> Vec<Self> {
        let Layout { names, mail_max_age, verdict_max_age, dead_max_age, .. } = layout;
        let [mail_max_bytes, verdict_max_bytes, dead_max_bytes, bucket_max_bytes] = layout.max_bytes;
        let mut all = vec![
            Self::parked(layout, server),
            Self::mail(layout, server).with_max_age("--mail-max-age", *mail_max_age, layout).with_max_bytes(
                "--mail-max-bytes",
                mail_max_bytes,
                layout,
            ),
            Self::consumer(layout, server),
            Self::stream(&names.verdict_stream, vec![names.verdict_wildcard()], layout)
                .with(Setting::always("retention", json!("limits")))
                .with_max_age("--verdict-max-age", *verdict_max_age, layout)
                .with_max_bytes("--verdict-max-bytes", verdict_max_bytes, layout),
            Self::stream(&names.dead_stream, vec![names.dead_wildcard()], layout)
                .with(Setting::always("retention", json!("limits")))
                .with_max_age("--dead-max-age", *dead_max_age, layout)
                .with_max_bytes("--dead-max-bytes", dead_max_bytes, layout),
        ];
        if let Some(bucket) = &layout.bucket {
            all.push(Self::bucket(bucket, layout).with_max_bytes("--bucket-max-bytes", bucket_max_bytes, layout));
        }
        if !server.schedules {
            all.push(Self::due_consumer(layout));
        }
        all
    }

    fn stream(name: &str, subjects: Vec<String>, layout: &Layout) -> Self {
        Self {
            kind: "stream",
            shown_name: name.to_owned(),
            about: None,
            info: format!("STREAM.INFO.{name}"),
            create: format!("STREAM.CREATE.{name}"),
            update: format!("STREAM.UPDATE.{name}"),
            settings: vec![
                Setting::at_first("name", json!(name)),
                Setting::at_first("max_msgs", json!(-1)),
                Setting::at_first("max_consumers", json!(-1)),
                Setting::at_first("subjects", json!(subjects)),
                Setting::always("discard", json!("new")),
                layout.setting("duplicate_window", "--duplicate-window", nanos(layout.duplicate_window)),
                layout.setting("storage", "--storage", json!(layout.storage)),
                layout.setting("num_replicas", "--replicas", json!(layout.replicas)),
            ],
            must_take: subjects,
            must_source: None,
            of_stream: None,
        }
    }

    /// The stream of parked retries. It has no limits beside the age of messages: a server that publishes what is due
    /// does not refuse what has no room, it would throw away what is oldest.
    fn parked(layout: &Layout, server: Server) -> Self {
        let mut wanted = Self::stream(&layout.names.parked_stream, vec![layout.names.parked_wildcard()], layout)
            .with(Setting::always("retention", json!("limits")))
            .with(Setting::always("max_bytes", json!(-1)))
            .with(Setting::at_first("max_age", nanos(layout.mail_max_age)));
        for setting in &mut wanted.settings {
            match setting.name {
                "discard" => setting.value = json!("old"),
                "max_msgs" => setting.lasting = true,
                _ => {}
            }
        }
        if server.schedules { wanted.with(Setting::always("allow_msg_schedules", json!(true))) } else { wanted }
    }

    /// Where retries wait that a host has to bring back.
    fn due_consumer(layout: &Layout) -> Self {
        let stream = &layout.names.parked_stream;
        let create = format!("CONSUMER.CREATE.{stream}.{DUE_CONSUMER}");
        Self {
            kind: "consumer",
            shown_name: format!("{stream}/{DUE_CONSUMER}"),
            about: None,
            info: format!("CONSUMER.INFO.{stream}.{DUE_CONSUMER}"),
            update: create.clone(),
            create,
            settings: vec![
                Setting::at_first("name", json!(DUE_CONSUMER)),
                Setting::at_first("durable_name", json!(DUE_CONSUMER)),
                Setting::at_first("deliver_policy", json!("all")),
                Setting::at_first("replay_policy", json!("instant")),
                Setting::always("ack_policy", json!("explicit")),
                Setting::always("max_deliver", json!(-1)),
                Setting::always("max_ack_pending", json!(-1)),
                Setting::at_first("ack_wait", nanos(DUE_ACK_WAIT)),
                Setting::always("filter_subject", json!(layout.names.held_wildcard())),
            ],
            must_take: Vec::new(),
            must_source: None,
            of_stream: Some(stream.clone()),
        }
    }

    /// The message stream, whose retention is the operator's choice.
    fn mail(layout: &Layout, server: Server) -> Self {
        let replays = layout.names.replay_wildcard();
        let mut subjects = [&layout.subjects[..], std::slice::from_ref(&replays)].concat();
        subjects.sort();
        let mut wanted = Self::stream(&layout.names.stream, vec![replays], layout)
            .with(Setting::at_first("retention", json!("limits")));
        wanted.settings.retain(|setting| setting.name != "subjects");
        let wanted = wanted.with(layout.setting("subjects", "--subjects", json!(subjects)));
        if !server.schedules {
            return wanted;
        }
        let Names { parked_stream, .. } = &layout.names;
        let transform = json!({ "src": layout.names.due_wildcard(), "dest": layout.names.replay_wildcard() });
        let source = json!({ "name": parked_stream, "subject_transforms": [transform] });
        let mut wanted = wanted.with(Setting::at_first("sources", json!([source])));
        wanted.must_source = Some(source);
        wanted
    }

    fn consumer(layout: &Layout, server: Server) -> Self {
        let Names { stream, consumer, .. } = &layout.names;
        let mut filter = layout.filter.clone().unwrap_or_default();
        let mut filters = Vec::new();
        let replays = layout.names.replay_subject(">");
        if server.many_filters && !filter.is_empty() {
            filters = vec![std::mem::take(&mut filter), replays.clone()];
            filters.sort();
        }
        let create = format!("CONSUMER.CREATE.{stream}.{consumer}");
        Self {
            kind: "consumer",
            shown_name: format!("{stream}/{consumer}"),
            about: None,
            info: format!("CONSUMER.INFO.{stream}.{consumer}"),
            update: create.clone(),
            create,
            settings: vec![
                Setting::at_first("name", json!(consumer)),
                Setting::at_first("durable_name", json!(consumer)),
                Setting::at_first("deliver_policy", json!("all")),
                Setting::at_first("replay_policy", json!("instant")),
                Setting::always("deliver_subject", json!("")),
                Setting::always("ack_policy", json!("explicit")),
                Setting::always("max_deliver", json!(-1)),
                layout.setting("ack_wait", "--ack-wait", nanos(layout.ack_wait)),
                layout.setting("max_ack_pending", "--max-ack-pending", json!(layout.max_ack_pending)),
                layout.setting("filter_subject", "--filter", json!(filter)),
                layout.setting("filter_subjects", "--filter", json!(filters)),
                Setting::always("backoff", json!([])),
                Setting::always("headers_only", json!(false)),
                Setting::always("inactive_threshold", json!(0)),
            ],
            must_take: if server.many_filters { vec![replays] } else { Vec::new() },
            must_source: None,
            of_stream: Some(stream.clone()),
        }
    }

    /// A bucket is a stream with a certain name and settings; these are the ones every client expects.
    fn bucket(bucket: &str, layout: &Layout) -> Self {
        let mut wanted = Self::stream(&format!("KV_{bucket}"), vec![format!("$KV.{bucket}.>")], layout)
            .with(Setting::always("retention", json!("limits")))
            .with(Setting::always("allow_rollup_hdrs", json!(true)))
            .with(Setting::always("deny_delete", json!(true)))
            .with(Setting::at_first("max_msgs_per_subject", json!(1)))
            .with(Setting::at_first("allow_direct", json!(true)));
        wanted.kind = "bucket";
        wanted.shown_name = bucket.to_owned();
        wanted.about = Some("for guests");
        // An expiry is the operator's own choice, and the window the server's.
        wanted.settings.retain(|setting| setting.name != "duplicate_window");
        wanted
    }

    fn with(mut self, setting: Setting) -> Self {
        self.settings.push(setting);
        self
    }

    fn with_max_age(self, flag: &'static str, age: Duration, layout: &Layout) -> Self {
        self.with(layout.setting("max_age", flag, nanos(age)))
    }

    fn with_max_bytes(self, flag: &'static str, bytes: u64, layout: &Layout) -> Self {
        self.with(layout.setting("max_bytes", flag, limit(bytes)))
    }

    /// What it is, for messages.
    fn what(&self) -> String {
        format!("{} {}", self.kind, self.shown_name)
    }

    /// What to do about it, if this is what is there.
    fn plan(mut self, found: Option<Found>, mode: Mode) -> Plan {
        let Some(found) = found else {
            let config = self.settings.iter().filter(|setting| !is_default(&setting.value));
            let config = config.map(|setting| (setting.name.to_owned(), setting.value.clone())).collect();
            let (action, config) =
                if mode == Mode::Check { (Action::None, None) } else { (Action::Create, Some(config)) };
            return Plan { wanted: self, found: None, differences: Vec::new(), action, config };
        };
        self.must_take(&found.config);
        self.must_source(&found.config);
        let differences = differences(&found.config, &self.settings);
        let mut config = found.config.clone();
        let mut action = Action::None;
        if !differences.is_empty() && matches!(mode, Mode::Update { .. }) {
            action = Action::Update;
            for Setting { name, value, .. } in self.settings.iter().filter(|setting| setting.lasting) {
                if is_default(value) {
                    config.remove(*name);
                } else {
                    config.insert((*name).to_owned(), value.clone());
                }
            }
        }
        Plan { wanted: self, found: Some(found), differences, action, config: Some(config) }
    }

    /// Makes what `have` lacks of [`Wanted::must_take`] a lasting setting, where no flag says otherwise. A consumer
    /// without a filter lacks nothing.
    fn must_take(&mut self, have: &Map<String, Value>) {
        let (name, mut taken) = match &self.of_stream {
            None => ("subjects", texts(have, "subjects")),
            Some(_) => ("filter_subjects", filters(have)),
        };
        let is_given = self.settings.iter().any(|setting| setting.name == name && setting.lasting);
        let unfiltered = self.of_stream.is_some() && taken.is_empty();
        let missing: Vec<_> =
            self.must_take.iter().filter(|one| !taken.iter().any(|other| covers(other, one))).collect();
        if is_given || unfiltered || missing.is_empty() {
            return;
        }
        taken.extend(missing.into_iter().cloned());
        taken.sort();
        for setting in &mut self.settings {
            if setting.name == name {
                (setting.value, setting.lasting) = (json!(taken), true);
            } else if setting.name == "filter_subject" {
                (setting.value, setting.lasting) = (json!(""), true);
            }
        }
    }

    /// Makes what `have` lacks of [`Wanted::must_source`] a lasting setting, beside the sources that are there.
    fn must_source(&mut self, have: &Map<String, Value>) {
        let Some(source) = &self.must_source else { return };
        let mut sources = have.get("sources").and_then(Value::as_array).cloned().unwrap_or_default();
        let has = |other: &Value| {
            other["name"] == source["name"] && other["subject_transforms"] == source["subject_transforms"]
        };
        if !sources.iter().any(has) {
            sources.retain(|other| other["name"] != source["name"]);
            sources.push(source.clone());
            for setting in self.settings.iter_mut().filter(|setting| setting.name == "sources") {
                (setting.value, setting.lasting) = (json!(sources), true);
            }
        }
    }

    async fn find(&self, jetstream: &Context) -> Result<Option<Found>> {
        match jetstream.request::<_, _, Response<Value>>(self.info.clone(), &json!({})).await? {
            Response::Ok(mut info) => {
                // A consumer has none of this.
                let state = serde_json::from_value(info["state"].take()).unwrap_or_default();
                Ok(Some(Found { config: config_of(info)?, state }))
            }
            Response::Err { error }
                if matches!(error.error_code(), ErrorCode::STREAM_NOT_FOUND | ErrorCode::CONSUMER_NOT_FOUND) =>
            {
                Ok(None)
            }
            Response::Err { error } => bail!("{error}"),
        }
    }

    async fn send(
        &self,
        jetstream: &Context,
        subject: &str,
        config: &Map<String, Value>,
    ) -> Result<Map<String, Value>> {
        let (request, filter) = match &self.of_stream {
            Some(stream) => (
                json!({ "stream_name": stream, "config": config }),
                config.get("filter_subject").and_then(Value::as_str),
            ),
            None => (json!(config), None),
        };
        // The server wants the filter in the request's subject as well.
        let subject = filter.map_or_else(|| subject.to_owned(), |filter| format!("{subject}.{filter}"));
        match jetstream.request(subject, &request).await? {
            Response::Ok(info) => config_of(info),
            Response::Err { error } => Err(match error.error_code() {
                ErrorCode::STREAM_SUBJECT_OVERLAP => self.overlap(jetstream, &texts(config, "subjects")).await,
                ErrorCode::STREAM_MAX_BYTES_REQUIRED => {
                    anyhow!("this account wants a size limit on every stream; give the --…-max-bytes flags")
                }
                ErrorCode::STREAM_REPLICAS_NOT_SUPPORTED => {
                    anyhow!("the server is not part of a cluster; use --replicas 1 ({error})")
                }
                ErrorCode::CONSUMER_MAX_PENDING_ACK_EXCESS => {
                    anyhow!("--max-ack-pending is more than the server allows: {error}")
                }
                ErrorCode::STORAGE_RESOURCES_EXCEEDED | ErrorCode::MEMORY_RESOURCES_EXCEEDED => {
                    anyhow!(
                        "the account's or server's storage does not suffice; lower the --…-max-bytes flags ({error})"
                    )
                }
                _ => anyhow!("{error}"),
            }),
        }
    }

    /// Names the streams that already take our subjects; the server does not.
    async fn overlap(&self, jetstream: &Context, subjects: &[String]) -> anyhow::Error {
        let mut others = Vec::new();
        for subject in subjects {
            let request = json!({ "subject": subject });
            let Ok(Response::Ok(page)) = jetstream.request::<_, _, Response<Value>>("STREAM.NAMES", &request).await
            else {
                continue;
            };
            let names = page["streams"].as_array().into_iter().flatten().filter_map(Value::as_str);
            others.extend(names.filter(|name| *name != self.shown_name).map(str::to_owned));
        }
        others.dedup();
        let others = if others.is_empty() { "another stream".into() } else { format!("stream {}", others.join(", ")) };
        anyhow!(
            "{others} already takes some of the subjects {}; a subject can be in one stream only: choose others, or \
             name that stream with --stream, --verdict-stream or --dead-stream",
            subjects.join(", ")
        )
    }
}

/// What is there.
struct Found {
    config: Map<String, Value>,
    state: Stock,
}

/// What a stream holds.
#[derive(Default, Deserialize)]
struct Stock {
    messages: u64,
    bytes: u64,
    /// When the oldest message was stored, RFC 3339.
    first_ts: String,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Action {
    None,
    Create,
    Update,
}

/// What is to be done about a thing.
struct Plan {
    wanted: Wanted,
    found: Option<Found>,
    differences: Vec<Difference>,
    action: Action,
    /// The configuration that is there when it is done; nothing, if it is missing then.
    config: Option<Map<String, Value>>,
}

impl Plan {
    /// Checks a stream's new limits.
    ///
    /// # Errors
    /// They contradict each other, or the server would delete messages to keep them and that is not allowed.
    fn check(&self, mode: Mode) -> Result<()> {
        let (Some(config), false) = (&self.config, self.action == Action::None) else { return Ok(()) };
        let what = self.wanted.what();
        let time = |config: &Map<String, Value>, name: &str| {
            Some(Duration::from_nanos(config.get(name)?.as_u64()?)).filter(|time| !time.is_zero())
        };
        let flag = |name: &str| {
            let setting = self.wanted.settings.iter().find(|setting| setting.name == name);
            setting.map_or("", |setting| setting.flag)
        };
        let max_age = time(config, "max_age");
        if let (Some(max_age), Some(window)) = (max_age, time(config, "duplicate_window")) {
            ensure!(
                max_age >= window,
                "{what}: {} {} must be at least --duplicate-window {}",
                flag("max_age"),
                as_typed(max_age),
                as_typed(window)
            );
        }
        let Some(Found { config: have, state: Stock { messages, bytes, first_ts } }) = &self.found else {
            return Ok(());
        };
        if mode == (Mode::Update { allow_loss: true }) || *messages == 0 {
            return Ok(());
        }
        let max_bytes = |config: &Map<String, Value>| config.get("max_bytes").and_then(Value::as_u64);
        if let Some(max_bytes) = max_bytes(config).filter(|max| max_bytes(have) != Some(*max) && max < bytes) {
            bail!(
                "{what} holds {} of {}: to keep {} {}, the server would delete the oldest; \
                 nothing was changed; give at least what it holds, or --allow-loss as well",
                counted(*messages, "message"),
                counted(*bytes, "byte"),
                flag("max_bytes"),
                show_size(max_bytes)
            );
        }
        if let Some(max_age) = max_age.filter(|max| time(have, "max_age").is_none_or(|have| *max < have)) {
            let oldest = humantime::parse_rfc3339(first_ts).with_context(|| format!("read the time {first_ts}"))?;
            ensure!(
                SystemTime::now().duration_since(oldest).unwrap_or_default() <= max_age,
                "{what} holds {}, the oldest since {first_ts}: to keep {} {}, the server would delete \
                 what is older; nothing was changed; give a longer time, or --allow-loss as well",
                counted(*messages, "message"),
                flag("max_age"),
                as_typed(max_age)
            );
        }
        Ok(())
    }

    /// Does it, and says what was done.
    async fn carry_out(&mut self, jetstream: &Context) -> Result<Thing> {
        let (wanted, what) = (&self.wanted, self.wanted.what());
        let state = match (self.action, &mut self.config) {
            (Action::Create, Some(config)) => {
                *config =
                    wanted.send(jetstream, &wanted.create, config).await.with_context(|| format!("create {what}"))?;
                State::Created
            }
            (Action::Update, Some(config)) => {
                *config = wanted.send(jetstream, &wanted.update, config).await.with_context(|| {
                    let names: Vec<_> = self.differences.iter().map(|difference| difference.setting).collect();
                    format!(
                        "update {what} ({}); a setting that cannot change needs a new {}",
                        names.join(", "),
                        wanted.kind
                    )
                })?;
                State::Updated
            }
            (_, None) => State::Missing,
            _ if self.differences.is_empty() => State::AsWanted,
            _ => State::Differs,
        };
        let differences = std::mem::take(&mut self.differences);
        Ok(Thing { kind: wanted.kind, name: wanted.shown_name.clone(), state, differences, about: self.about() })
    }

    /// What the thing is for, in a few words: the subjects it takes.
    fn about(&self) -> String {
        let Some(config) = &self.config else { return self.wanted.about.unwrap_or_default().to_owned() };
        let subjects = match (self.wanted.about, &self.wanted.of_stream) {
            (Some(about), _) => return about.to_owned(),
            (None, None) => texts(config, "subjects"),
            (None, Some(_)) => {
                let mut filters = filters(config);
                filters.retain(|filter| !self.wanted.must_take.contains(filter));
                filters
            }
        };
        if subjects.is_empty() { "all of the stream".into() } else { subjects.join(", ") }
    }
}

/// The texts in a list of a configuration, sorted.
fn texts(config: &Map<String, Value>, name: &str) -> Vec<String> {
    let texts = config.get(name).and_then(Value::as_array).into_iter().flatten();
    let mut texts: Vec<_> = texts.filter_map(Value::as_str).map(str::to_owned).collect();
    texts.sort();
    texts
}

/// A consumer's filters, of either kind.
fn filters(config: &Map<String, Value>) -> Vec<String> {
    let mut filters = texts(config, "filter_subjects");
    let filter = config.get("filter_subject").and_then(Value::as_str);
    filters.extend(filter.filter(|filter| !filter.is_empty()).map(str::to_owned));
    filters
}

fn config_of(info: Value) -> Result<Map<String, Value>> {
    match info {
        Value::Object(mut info) => match info.remove("config") {
            Some(Value::Object(config)) => Ok(config),
            _ => bail!("the server's answer has no configuration"),
        },
        _ => bail!("the server's answer is no object"),
    }
}

fn differences(have: &Map<String, Value>, want: &[Setting]) -> Vec<Difference> {
    let mut found = Vec::new();
    for Setting { name, value: want, .. } in want.iter().filter(|setting| setting.lasting) {
        let have = match *name {
            "subjects" | "filter_subjects" => json!(texts(have, name)),
            _ => have.get(*name).cloned().unwrap_or(Value::Null),
        };
        if have != *want && !(is_default(&have) && is_default(want)) {
            found.push(Difference { setting: name, have: show_value(name, &have), want: show_value(name, want) });
        }
    }
    found
}

/// Whether the server leaves such a value out of its answers. A limit of -1 is one it does not leave out.
fn is_default(value: &Value) -> bool {
    match value {
        Value::Null => true,
        Value::Bool(value) => !value,
        Value::Number(value) => value.as_u64() == Some(0),
        Value::String(value) => value.is_empty(),
        Value::Array(value) => value.is_empty(),
        Value::Object(value) => value.is_empty(),
    }
}

fn show_value(setting: &str, value: &Value) -> String {
    match (setting, value) {
        ("max_age", value) if is_default(value) => "for ever".into(),
        ("max_age" | "ack_wait" | "duplicate_window" | "inactive_threshold", Value::Number(nanos)) => {
            humantime::format_duration(Duration::from_nanos(nanos.as_u64().unwrap_or(0))).to_string()
        }
        ("max_bytes", Value::Number(bytes)) => bytes.as_u64().map_or("no limit".into(), show_size),
        ("headers_only" | "allow_rollup_hdrs" | "deny_delete" | "allow_msg_schedules", Value::Null) => "false".into(),
        (_, value) if is_default(value) => "none".into(),
        ("sources", Value::Array(sources)) => {
            sources.iter().filter_map(|source| source["name"].as_str()).collect::<Vec<_>>().join(", ")
        }
        (_, Value::String(text)) => text.clone(),
        (_, Value::Array(items)) => {
            let mut text = String::new();
            for item in items {
                let comma = if text.is_empty() { "" } else { ", " };
                let _ = write!(text, "{comma}{}", item.as_str().map_or_else(|| item.to_string(), str::to_owned));
            }
            text
        }
        (_, value) => value.to_string(),
    }
}

fn nanos(duration: Duration) -> Value {
    json!(u64::try_from(duration.as_nanos()).unwrap_or(u64::MAX))
}

fn limit(bytes: u64) -> Value {
    if bytes == 0 { json!(-1) } else { json!(bytes) }
}

/// A time as a flag takes it, in one word.
fn as_typed(time: Duration) -> String {
    let seconds = time.as_secs();
    match [(86_400, "d"), (3_600, "h"), (60, "m"), (1, "s")].into_iter().find(|(unit, _)| seconds.is_multiple_of(*unit))
    {
        _ if time.is_zero() => "0".into(),
        Some((unit, name)) if time.subsec_nanos() == 0 => format!("{}{name}", seconds / unit),
        // Rounded up.
        _ => format!("{}ms", time.as_nanos().div_ceil(1_000_000)),
    }
}

fn parse_age(text: &str) -> Result<Duration, humantime::DurationError> {
    if text == "0" { Ok(Duration::ZERO) } else { humantime::parse_duration(text) }
}

/// Reads a size in bytes: `4096`, `64k`, `10GiB`. Units are powers of 1024, however they are written.
fn parse_size(text: &str) -> Result<u64> {
    let digits = text.find(|c: char| !c.is_ascii_digit()).unwrap_or(text.len());
    let (number, unit) = text.split_at(digits);
    let shift = match unit.trim().to_ascii_lowercase().as_str() {
        "" | "b" => 0,
        "k" | "kb" | "kib" => 10,
        "m" | "mb" | "mib" => 20,
        "g" | "gb" | "gib" => 30,
        "t" | "tb" | "tib" => 40,
        _ => bail!("a size is a number with a unit, such as 512MiB or 10GiB"),
    };
    let number: u64 = number.parse().context("a size is a number with a unit, such as 512MiB or 10GiB")?;
    let bytes = number.checked_mul(1 << shift).filter(|&bytes| i64::try_from(bytes).is_ok());
    bytes.context("this size is larger than NATS can count")
}

/// The size as [`parse_size`] reads it, in the largest unit that gives a whole number.
fn show_size(bytes: u64) -> String {
    let unit = [(40, "TiB"), (30, "GiB"), (20, "MiB"), (10, "KiB")]
        .into_iter()
        .find(|(shift, _)| bytes > 0 && bytes.is_multiple_of(1 << shift));
    unit.map_or_else(|| bytes.to_string(), |(shift, unit)| format!("{}{unit}", bytes >> shift))
}

#[cfg(test)]
mod tests {
    use super::*;
    use async_nats::jetstream::consumer::AckPolicy;

    const DEADLINE: Duration = Duration::from_secs(1);
    const DAY: Duration = Duration::from_secs(24 * 60 * 60);

    fn stream(name: &str) -> stream::Config {
        stream::Config { name: name.into(), discard: DiscardPolicy::New, max_age: 7 * DAY, ..Default::default() }
    }

    fn consumer() -> consumer::Config {
        consumer::Config {
            durable_name: Some("triage".into()),
            ack_policy: AckPolicy::Explicit,
            ack_wait: Duration::from_secs(30),
            max_deliver: -1,
            ..Default::default()
        }
    }

    #[test]
    fn unsafe_settings_are_named() {
        type Change = fn(&mut stream::Config, &mut consumer::Config, &mut stream::Config);
        // (change to safe settings, what the one finding says; nothing if it stays safe)
        let cases: Vec<(Change, Option<&str>)> = vec![
            (|_, _, _| (), None),
            (|_, consumer, _| consumer.deliver_subject = Some("x".into()), Some("push consumer")),
            (|_, consumer, _| consumer.ack_policy = AckPolicy::All, Some("ack policy All")),
            (|_, consumer, _| consumer.ack_policy = AckPolicy::None, Some("ack policy None")),
            (|_, consumer, _| consumer.max_deliver = 5, Some("max_deliver 5")),
            (|_, consumer, _| consumer.ack_wait = DEADLINE, Some("ack_wait 1s")),
            (|_, consumer, _| consumer.ack_wait = 2 * DEADLINE, None),
            (|_, consumer, _| consumer.backoff = vec![10 * DEADLINE, DEADLINE / 2], Some("back-off 500ms")),
            (|_, consumer, _| consumer.headers_only = true, Some("headers only")),
            (|_, _, verdicts| verdicts.max_age = 6 * DAY, Some("second verdict")),
            (|mail, _, _| mail.max_age = Duration::ZERO, Some("for ever")),
            (|mail, _, verdicts| (mail.max_age, verdicts.max_age) = (Duration::ZERO, Duration::ZERO), None),
            (|_, _, verdicts| verdicts.max_age = Duration::ZERO, None),
            (|_, _, verdicts| verdicts.retention = RetentionPolicy::WorkQueue, Some("retention WorkQueue")),
            (|_, _, verdicts| verdicts.discard = DiscardPolicy::Old, None),
            (
                |_, _, verdicts| (verdicts.discard, verdicts.max_messages) = (DiscardPolicy::Old, 9),
                Some("discard old with max_msgs 9"),
            ),
            (
                |_, _, verdicts| (verdicts.discard, verdicts.max_bytes) = (DiscardPolicy::Old, 9),
                Some("discard old with"),
            ),
            (|_, _, verdicts| verdicts.max_bytes = 9, None),
            (|_, _, verdicts| verdicts.no_ack = true, Some("no_ack")),
        ];
        for (number, (change, expected)) in cases.into_iter().enumerate() {
            let (mut mail, mut triage, mut verdicts) = (stream("MAIL"), consumer(), stream("VERDICTS"));
            change(&mut mail, &mut triage, &mut verdicts);
            let found = unsafe_settings(&mail, &triage, &verdicts, DEADLINE);
            match expected {
                None => assert!(found.is_empty(), "case {number}: {found:?}"),
                Some(expected) => assert!(found.len() == 1 && found[0].contains(expected), "case {number}: {found:?}"),
            }
        }
    }

    #[test]
    fn the_advice_about_unsafe_times_mends_them() {
        for (deadline, mail_max_age, advice) in [
            (30_000, 7 * DAY, ["--ack-wait 1m`", "--verdict-max-age 7d`"]),
            (40_000, 90 * DAY / 24, ["--ack-wait 80s`", "--verdict-max-age 90h`"]),
            (30_001, Duration::ZERO, ["--ack-wait 60002ms`", "--verdict-max-age 0`"]),
        ] {
            let (mut mail, mut verdicts) = (stream("MAIL"), stream("VERDICTS"));
            (mail.max_age, verdicts.max_age) = (mail_max_age, DEADLINE);
            let found = unsafe_settings(&mail, &consumer(), &verdicts, Duration::from_millis(deadline)).join("; ");
            assert!(advice.iter().all(|advice| found.contains(advice)), "{found}");
        }
    }

    #[test]
    fn unsafe_wishes_are_refused() {
        type Change = fn(&mut Layout);
        let cases: Vec<(Change, &str)> = vec![
            (|layout| (layout.given, layout.ack_wait) = (given("ack_wait"), layout.deadline), "--ack-wait"),
            (|layout| layout.duplicate_window = DEADLINE / 20, "--duplicate-window"),
            (|layout| layout.subjects = vec!["mail.>".into(), "verdict.*.x".into()], "--verdict-subject"),
            (|layout| layout.subjects = vec![">".into()], "overlaps"),
            (|layout| layout.subjects = vec!["dead.letters.>".into()], "--dead-subject"),
            (|layout| layout.subjects = vec!["replay.*.x".into()], "--replay-subject"),
            (|layout| layout.subjects = vec!["a..b".into()], "--subjects"),
            (|layout| layout.filter = Some("a..b".into()), "--filter"),
            (|layout| layout.bucket = Some("a b".into()), "--bucket"),
        ];
        for (change, expected) in cases {
            let mut layout = Layout::new(Names::default());
            layout.check().expect("the defaults are safe");
            change(&mut layout);
            let err = layout.check().expect_err(expected).to_string();
            assert!(err.contains(expected), "{err}");
        }
    }

    fn given(argument: &str) -> Given {
        Given([argument.to_owned()].into())
    }

    fn typed(args: &[&str]) -> Layout {
        #[derive(Debug, clap::Parser)]
        struct Command {
            #[command(flatten)]
            layout: LayoutArgs,
        }
        let args = std::iter::once("test").chain(args.iter().copied());
        <Command as clap::Parser>::parse_from(args).layout.resolve(Names::default()).expect("sound settings")
    }

    /// One that can all of it.
    const NEW: Server = Server { many_filters: true, schedules: true };

    #[test]
    fn flags_and_defaults_agree() {
        assert_eq!(format!("{:?}", typed(&[])), format!("{:?}", Layout::new(Names::default())));
    }

    /// What is compared with what exists: settings that no flag is given for only where the host needs them.
    #[test]
    fn what_no_flag_is_given_for_stays_as_it_is() {
        let names = |wanted: &Wanted| -> Vec<&str> {
            wanted.settings.iter().filter(|setting| setting.lasting).map(|setting| setting.name).collect()
        };
        let all = |args: &[&str]| Wanted::all(&typed(args), NEW).iter().map(names).collect::<Vec<_>>();
        let consumer =
            ["deliver_subject", "ack_policy", "max_deliver", "backoff", "headers_only", "inactive_threshold"];
        let kept = ["discard", "retention"];
        let bucket = ["discard", "retention", "allow_rollup_hdrs", "deny_delete"];
        let parked = ["max_msgs", "discard", "retention", "max_bytes", "allow_msg_schedules"];
        assert_eq!(all(&[]), [&parked[..], &kept[..1], &consumer, &kept, &kept, &bucket]);
        let all = all(&["--no-bucket", "--mail-max-age", "1d", "--storage", "file", "--filter", "mail.a"]);
        assert_eq!(all[1], ["discard", "storage", "max_age"]);
        assert!(all[2].contains(&"filter_subjects") && !all[2].contains(&"ack_wait"), "{:?}", all[2]);
        assert_eq!(all[4], ["discard", "storage", "retention"]);
    }

    /// An older server knows nothing of schedules: retries wait at a consumer there.
    #[test]
    fn what_is_wanted_is_what_the_server_can() {
        let shown = |server| -> Vec<String> {
            let all = Wanted::all(&typed(&[]), server);
            let with_sources = all.iter().filter(|wanted| wanted.must_source.is_some());
            let sources = with_sources.map(|wanted| format!("{} has a source", wanted.shown_name));
            all.iter().map(|wanted| wanted.shown_name.clone()).chain(sources).collect()
        };
        let always = ["PARKED", "MAIL", "MAIL/triage", "VERDICTS", "DEAD", "triage"];
        assert_eq!(shown(NEW), [&always[..], &["MAIL has a source"]].concat());
        assert_eq!(shown(Server { many_filters: true, schedules: false }), [&always[..], &["PARKED/due"]].concat());
    }

    #[test]
    fn a_source_is_added_to_those_that_a_stream_has() {
        let ours = json!({
            "name": "PARKED", "subject_transforms": [{ "src": "parked.due.MAIL.>", "dest": "replay.MAIL.>" }]
        });
        let other = json!({ "name": "OTHER", "filter_subject": "mail.>" });
        let wrong = json!({ "name": "PARKED" });
        for (have, expected) in [
            (json!({}), Some(json!([ours]))),
            (json!({ "sources": [other, ours] }), None),
            (json!({ "sources": [other] }), Some(json!([other, ours]))),
            (json!({ "sources": [wrong, other] }), Some(json!([other, ours]))),
        ] {
            let mut mail = Wanted::mail(&typed(&[]), NEW);
            mail.must_source(have.as_object().expect("an object"));
            let sources = mail.settings.iter().find(|setting| setting.name == "sources").expect("sources");
            assert_eq!(sources.lasting.then_some(&sources.value), expected.as_ref(), "{have}");
        }
    }

    #[test]
    fn replays_are_added_to_what_a_stream_and_a_filter_take() {
        type Case = (usize, Value, Option<(&'static str, Value)>);
        let replays = "replay.MAIL.triage.>";
        let cases: [Case; 8] = [
            (1, json!({ "subjects": ["orders.>"] }), Some(("subjects", json!(["orders.>", "replay.MAIL.>"])))),
            (1, json!({ "subjects": ["replay.>", "orders.>"] }), None),
            (3, json!({ "subjects": ["verdict.>", "more"] }), None),
            (3, json!({ "subjects": ["v"] }), Some(("subjects", json!(["v", "verdict.>"])))),
            (2, json!({}), None),
            (2, json!({ "filter_subject": "mail.a" }), Some(("filter_subjects", json!(["mail.a", replays])))),
            (2, json!({ "filter_subjects": [">"] }), None),
            (2, json!({ "filter_subjects": ["b", "a"] }), Some(("filter_subjects", json!(["a", "b", replays])))),
        ];
        for (number, have, expected) in cases {
            let mut wanted = Wanted::all(&typed(&[]), NEW).swap_remove(number);
            wanted.must_take(have.as_object().expect("an object"));
            let mut lists = wanted.settings.iter().filter(|setting| setting.lasting && setting.value.is_array());
            let found = lists.find(|setting| setting.name != "backoff").map(|setting| (setting.name, &setting.value));
            assert_eq!(found, expected.as_ref().map(|(name, value)| (*name, value)), "{have}");
        }
    }

    #[test]
    fn only_real_differences_count() {
        let have = json!({
            "subjects": ["b", "a"], "max_age": 604_800_000_000_000_u64, "max_bytes": -1, "discard": "old", "filter_subject": "x"
        });
        let want = [
            ("subjects", json!(["a", "b"])),
            ("max_age", nanos(DAY)),
            ("max_bytes", limit(0)),
            ("discard", json!("new")),
            ("backoff", json!([])),
            ("filter_subject", json!("")),
            ("allow_rollup_hdrs", json!(true)),
        ];
        let want = want.map(|(name, value)| Setting::always(name, value));
        let found: Vec<String> = differences(have.as_object().expect("object"), &want)
            .into_iter()
            .map(|Difference { setting, have, want }| format!("{setting} {have} {want}"))
            .collect();
        assert_eq!(
            found,
            ["max_age 7days 1day", "discard old new", "filter_subject x none", "allow_rollup_hdrs false true"]
        );
    }

    #[test]
    fn sizes_have_units() {
        for (text, bytes) in [("0", 0), ("4096", 4096), ("64k", 65_536), ("10GiB", 10 << 30), ("2 mb", 2 << 20)] {
            assert_eq!(parse_size(text).expect(text), bytes);
            assert_eq!(parse_size(&show_size(bytes)).expect(text), bytes);
        }
        for text in ["", "GiB", "1.5G", "10x", "-1", "99999999T"] {
            assert!(parse_size(text).is_err(), "{text}");
        }
    }
}
