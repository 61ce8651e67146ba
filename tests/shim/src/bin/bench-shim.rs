//! Measures pods with the shim against pods with a native program under runc: how fast they start, what they use.
//!
//! `cargo xtask bench shim` builds what it needs and runs it, as root. The tables go to standard output, all that was
//! measured to a JSON file.

use anyhow::{Context as _, Result, anyhow, ensure};
use futures::StreamExt as _;
use serde_json::{Value, json};
use shim_tests::{CRUN, Container, ContainerBuilder, Image, MAILROOM, MAILROOM_CRUN, Node, Pod, RUNC, archive};
use std::collections::BTreeMap;
use std::fs;
use std::io::ErrorKind;
use std::path::Path;
use std::process::ExitCode;
use std::time::{Duration, Instant, SystemTime};
use tests::bed::{Bed, SOON};
use tests::report::{Memory, about, compared, median, table, turns, write_json};
use tests::{Settings, asked_to_stop, command, http, streams, tools};
use tokio::time::{sleep, timeout};

/// A kind of pod.
struct Variant {
    key: &'static str,
    name: &'static str,
    handler: &'static str,
    image: &'static str,
    /// Whether the node has no machine code of the component when the pod starts.
    compiles: bool,
}

const fn variant(key: &'static str, name: &'static str, handler: &'static str, image: &'static str) -> Variant {
    Variant { key, name, handler, image, compiles: false }
}

/// All others are compared with the first.
const VARIANTS: [Variant; 6] = [
    variant("native", "runc, native handler", RUNC, NATIVE),
    variant("shim", "shim, component cached", MAILROOM, COMPONENT),
    Variant { compiles: true, ..variant("shim-compiling", "shim, component to be compiled", MAILROOM, COMPONENT) },
    variant("host-image", "runc, image with the host", RUNC, HOST),
    variant("native-crun", "crun, native handler", CRUN, NATIVE),
    variant("shim-crun", "shim with crun, component cached", MAILROOM_CRUN, COMPONENT),
];

/// The images.
const NATIVE: &str = "native";
const COMPONENT: &str = "triage";
const HOST: &str = "triage-host";

/// Pods of a kind that live at a time when their memory is measured: pods of a node share what they can.
const PODS: usize = 5;

/// Messages that those pods work on before their memory is measured again.
const LOAD: usize = 2000;

/// Longest wait for anything that a pod does.
const DEADLINE: Duration = SOON;

/// How often a pod is asked whether it is ready.
const POLL: Duration = Duration::from_millis(1);

/// Grace of the pods at their end.
const GRACE: Duration = Duration::from_secs(10);

#[tokio::main]
async fn main() -> ExitCode {
    let args: Vec<String> = std::env::args().skip(1).collect();
    let args: Vec<&str> = args.iter().map(String::as_str).collect();
    let ended = match args[..] {
        ["--rounds", rounds, "--json", file] => tokio::select! {
            ended = run(rounds, file.as_ref()) => ended,
            () = asked_to_stop() => Err(anyhow!("interrupted")),
        },
        _ => Err(anyhow!("usage: bench-shim --rounds N --json FILE; `cargo xtask bench shim` runs it")),
    };
    match ended {
        Ok(()) => ExitCode::SUCCESS,
        Err(err) => {
            eprintln!("error: {err:#}");
            ExitCode::FAILURE
        }
    }
}

async fn run(rounds: &str, file: &Path) -> Result<()> {
    let rounds: usize = rounds.parse().with_context(|| format!("--rounds {rounds}"))?;
    let began = Instant::now();
    // For all variants alike, so that all of them run on the same node.
    let node = Node::start_for_crun().await?;
    let images = images(&node).await?;
    let mut bed = Bed::on(node.nats(Settings::default()).await?, &[]).await?;
    bed.server.process().quiet();
    let bench = Bench { node, bed, mail: fs::read(tools::mails()?.first().context("a mail")?)? };

    let mut starts: BTreeMap<&str, Vec<Start>> = BTreeMap::new();
    for round in 0..=rounds {
        for variant in turns(&VARIANTS, round) {
            let start = bench.start(variant).await.with_context(|| format!("start a pod: {}", variant.name))?;
            // The first round finds cold caches, and no component compiled.
            if round > 0 {
                starts.entry(variant.key).or_default().push(start);
            }
        }
        eprintln!("    {round} of {rounds} rounds, {:.0} s", began.elapsed().as_secs_f32());
    }
    let mut uses: BTreeMap<&str, Vec<Use>> = BTreeMap::new();
    for variant in VARIANTS.iter().filter(|variant| !variant.compiles) {
        let used = bench.uses(variant).await.with_context(|| format!("measure memory: {}", variant.name))?;
        uses.insert(variant.key, used);
        eprintln!("    memory of {PODS} pods: {}, {:.0} s", variant.name, began.elapsed().as_secs_f32());
    }
    bench.node.finish().await?;

    println!("{}\n{}", times(rounds, &starts), memory(&uses, &images));
    let about = about(&["containerd", "runc", "crun"]);
    for (name, value) in &about {
        println!("{name}: {value}");
    }
    let kinds = VARIANTS.iter().map(|variant| {
        let starts: Vec<Value> = starts[variant.key].iter().map(Start::json).collect();
        let uses: Vec<Value> = uses.get(variant.key).into_iter().flatten().map(Use::json).collect();
        let kind =
            json!({ "name": variant.name, "starts": starts, "memory": uses, "image_bytes": images[variant.image] });
        (variant.key.to_owned(), kind)
    });
    let report = json!({ "about": about, "kinds": kinds.collect::<BTreeMap<_, _>>() });
    write_json(file, &report)?;
    println!("all of it: {}", file.display());
    Ok(())
}

/// Makes the images and gives them to the node; returns their sizes in bytes, compressed as in a registry.
async fn images(node: &Node) -> Result<BTreeMap<&'static str, usize>> {
    let native = fs::read(tools::native_static()?).context("read the native handler")?;
    let native = Image::scratch(NATIVE, &["/native-handler"]).file("/native-handler", native).compressed();
    let native_bytes = archive(std::slice::from_ref(&native))?.len();
    node.import(&[native]).await?;
    let mut sizes = BTreeMap::from([(NATIVE, native_bytes)]);
    let host = tools::shim()?.join("mailroom-host");
    let host = ["--format", "host", "--executable", &*host.to_string_lossy()];
    for (name, args) in [(COMPONENT, &[][..]), (HOST, &host)] {
        let tar = node.folder().join(format!("{name}.tar"));
        let (component, output) = (tools::component("triage")?, tar.to_string_lossy().into_owned());
        let full = format!("mailroom.local/{name}:1");
        let fixed = ["image", &*component.to_string_lossy(), "--name", &full, "--output", &output];
        command::host(fixed.iter().chain(args)).await?.success()?;
        node.import_archive(&tar).await?;
        node.until_image(&full).await?;
        sizes.insert(name, usize::try_from(fs::metadata(&tar)?.len())?);
    }
    Ok(sizes)
}

struct Bench {
    node: Node,
    bed: Bed,
    mail: Vec<u8>,
}

/// How long it took to start a pod.
struct Start {
    /// Of the three calls that a kubelet makes: RunPodSandbox, CreateContainer, StartContainer.
    calls: [Duration; 3],
    /// From RunPodSandbox to the first verdict, by the server's time.
    verdict: Duration,
    /// From StartContainer to readiness.
    ready: Duration,
    /// From StartContainer to the acknowledgement of a message that waited.
    settled: Duration,
}

/// The memory of a pod: PSS in KiB, of the shim, of the process that holds the pod's namespaces, and of the container.
#[derive(Clone, Copy)]
struct Use {
    idle: [Memory; 3],
    loaded: [Memory; 3],
}

impl Bench {
    fn container<'a>(&self, pod: &'a Pod<'a>, variant: &Variant) -> ContainerBuilder<'a> {
        let container = pod.container(variant.image).env("MAILROOM_SERVER", self.bed.server.url());
        container.env("MAILROOM_LISTEN", "0.0.0.0:9464")
    }

    /// Starts a pod for which a message waits, and removes it.
    async fn start(&self, variant: &Variant) -> Result<Start> {
        if variant.compiles {
            match fs::remove_dir_all(self.node.cache()) {
                Err(err) if err.kind() != ErrorKind::NotFound => return Err(err).context("empty the cache"),
                _ => {}
            }
        }
        let client = self.bed.server.client().await?;
        let mut acknowledgements = client.subscribe("$JS.ACK.MAIL.triage.>").await?;
        client.flush().await?;
        self.publish(1).await?;

        let (began, began_at) = (Instant::now(), SystemTime::now());
        let pod = self.node.pod_of(variant.handler).run().await?;
        let sandboxed = began.elapsed();
        let address = pod.address().await?;
        let creating = Instant::now();
        let container = self.container(&pod, variant).create().await?;
        let created = creating.elapsed();
        let starting = Instant::now();
        let started = async {
            container.start().await.context("start the container")?;
            Ok(starting.elapsed())
        };
        let ready = async {
            until_ready(&address).await?;
            Ok(starting.elapsed())
        };
        let settled = async {
            let acknowledged = timeout(DEADLINE, acknowledgements.next()).await;
            let acknowledged = acknowledged.context("no message was settled")?.context("the server has gone")?;
            ensure!(acknowledged.payload == "+ACK", "the message got no verdict: {:?}", acknowledged.payload);
            Ok(starting.elapsed())
        };
        let (started, ready, settled) = tokio::try_join!(started, ready, settled)?;

        let verdicts = self.bed.jetstream.get_stream(streams::VERDICTS).await?;
        let verdict = verdicts.get_last_raw_message_by_subject("verdict.>").await.context("read the verdict")?;
        let verdict = SystemTime::from(verdict.time).duration_since(began_at).context("the server's clock")?;
        let status = container.stop(GRACE).await?;
        ensure!(status.exit_code == 0, "the container ended with {}", status.exit_code);
        pod.remove().await?;
        Ok(Start { calls: [sandboxed, created, started], verdict, ready, settled })
    }

    /// Measures the memory of pods that live together.
    async fn uses(&self, variant: &Variant) -> Result<Vec<Use>> {
        let mut pods = Vec::new();
        for _ in 0..PODS {
            pods.push(self.node.pod_of(variant.handler).run().await?);
        }
        let mut containers = Vec::new();
        for pod in &pods {
            containers.push(self.container(pod, variant).start().await?);
            until_ready(&pod.address().await?).await?;
        }
        let mut idle = Vec::new();
        for (pod, container) in pods.iter().zip(&containers) {
            idle.push(self.memory(pod, container).await?);
        }
        self.publish(LOAD).await?;
        self.bed.settled().await?;
        let mut uses = Vec::new();
        for ((pod, container), idle) in pods.iter().zip(&containers).zip(idle) {
            uses.push(Use { idle, loaded: self.memory(pod, container).await? });
        }
        for container in containers {
            container.stop(GRACE).await?;
        }
        for pod in pods {
            pod.remove().await?;
        }
        Ok(uses)
    }

    async fn memory(&self, pod: &Pod<'_>, container: &Container<'_>) -> Result<[Memory; 3]> {
        let processes = self.node.processes();
        let is_shim = |command: &str| command.contains("containerd-shim-") && command.contains(pod.id());
        let shim = processes.iter().find(|process| is_shim(&process.command)).context("the pod has no shim")?.pid;
        Ok([Memory::of(shim)?, Memory::of(pod.pid().await?)?, Memory::of(container.pid().await?)?])
    }

    async fn publish(&self, count: usize) -> Result<()> {
        let mut stored = Vec::new();
        for _ in 0..count {
            stored.push(self.bed.jetstream.publish("mail.bench", self.mail.clone().into()).await?);
        }
        for stored in stored {
            stored.await?;
        }
        Ok(())
    }
}

async fn until_ready(address: &str) -> Result<()> {
    let url = format!("http://{address}:9464/readyz");
    let ready = async {
        while !http::get(&url).await.is_ok_and(|response| response.status == 200) {
            sleep(POLL).await;
        }
    };
    timeout(DEADLINE, ready).await.context("the pod is not ready")
}

impl Start {
    /// What the table shows.
    fn shown(&self) -> [Duration; 3] {
        [self.verdict, self.ready, self.settled]
    }

    fn json(&self) -> Value {
        let seconds = |times: &[Duration]| times.iter().map(Duration::as_secs_f64).collect::<Vec<_>>();
        json!({
            "run_pod_sandbox_create_container_start_container_s": seconds(&self.calls),
            "run_pod_sandbox_to_verdict_s": self.verdict.as_secs_f64(),
            "start_container_to_ready_s": self.ready.as_secs_f64(),
            "start_container_to_settled_s": self.settled.as_secs_f64(),
        })
    }
}

impl Use {
    fn json(&self) -> Value {
        let parts =
            |[shim, pause, container]: &[Memory; 3]| json!({ "shim": shim, "pause": pause, "container": container });
        json!({ "idle": parts(&self.idle), "loaded": parts(&self.loaded) })
    }
}

/// How long starts took, as a table.
fn times(rounds: usize, starts: &BTreeMap<&str, Vec<Start>>) -> String {
    let heads = [
        "",
        "RunPodSandbox to\nfirst verdict",
        "÷",
        "StartContainer to\nready",
        "÷",
        "StartContainer to first\nmessage settled",
        "÷",
        "of it the\ncall",
    ];
    let mut rows = Vec::new();
    let medians =
        |key: &str, of: &dyn Fn(&Start) -> Duration| median(starts[key].iter().map(|start| of(start).as_secs_f64()));
    for variant in &VARIANTS {
        let mut row = vec![variant.name.to_owned()];
        for column in 0..3 {
            let of = |start: &Start| start.shown()[column];
            row.extend(compared(medians(variant.key, &of), medians(VARIANTS[0].key, &of), 1e3, "ms"));
        }
        row.push(format!("{:.1} ms", 1e3 * medians(variant.key, &|start| start.calls[2])));
        rows.push(row);
    }
    format!("Time to start, medians of {rounds}, the kinds in turns\n\n{}", table(&heads, &rows))
}

/// What pods use, as a table.
fn memory(uses: &BTreeMap<&str, Vec<Use>>, images: &BTreeMap<&str, usize>) -> String {
    let loaded = format!("pod, after\n{LOAD} messages");
    let heads = ["", "shim", "pause", "container", "pod,\nidle", "÷", &loaded, "÷", "image"];
    let mut rows = Vec::new();
    for variant in VARIANTS.iter().filter(|variant| uses.contains_key(variant.key)) {
        let medians = |key: &str, of: &dyn Fn(&Use) -> u64| median(uses[key].iter().map(|used| of(used) as f64));
        let of = |of: &dyn Fn(&Use) -> u64| (medians(variant.key, of), medians(VARIANTS[0].key, of));
        let mut row = vec![variant.name.to_owned()];
        for part in 0..3 {
            let (kib, _) = of(&|used| used.idle[part].pss_kib);
            row.push(format!("{:.1} MiB", kib / 1024.0));
        }
        for sum in [&(|used: &Use| sum(&used.idle)) as &dyn Fn(&Use) -> u64, &|used| sum(&used.loaded)] {
            let (kib, first) = of(sum);
            row.extend(compared(kib, first, 1.0 / 1024.0, "MiB"));
        }
        row.push(format!("{:.2} MB", images[variant.image] as f64 / 1e6));
        rows.push(row);
    }
    format!("Memory of a pod (PSS), medians of {PODS} that live together\n\n{}", table(&heads, &rows))
}

fn sum(parts: &[Memory; 3]) -> u64 {
    parts.iter().map(|part| part.pss_kib).sum()
}
