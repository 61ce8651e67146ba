//! A whole Kubernetes on this machine: etcd, API server, scheduler, controllers, and a kubelet on a [`Node`].

use crate::leftovers;
use crate::node::{GONE_DEADLINE, Node, Shim};
use anyhow::{Context as _, Result, ensure};
use rustix::mount::{UnmountFlags, unmount};
use serde_json::{Value, json};
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;
use tests::page::free_port;
use tests::{Process, command, eventually, http, tools};

/// What the one node is called.
const NODE: &str = "node-0";

/// The kubelet's folder in that of the node.
const KUBELET: &str = "kubelet";

/// Each part is there within seconds; a machine that compiles beside it is slow.
const START_DEADLINE: Duration = Duration::from_secs(120);

/// The longest that `kubectl` may take. What it is told to wait for has a time limit of its own.
const KUBECTL_DEADLINE: Duration = Duration::from_secs(300);

/// Time for pods to go, those with a grace period included.
const DRAINED_DEADLINE: Duration = Duration::from_secs(120);

/// Where a kubelet has the logs of pods, whatever it is told.
const LOGS: [&str; 2] = ["/var/log/pods", "/var/log/containers"];

/// What a kubelet sets of the kernel's, for all of the machine.
const KERNEL: [&str; 6] = [
    "vm/overcommit_memory",
    "vm/panic_on_oom",
    "kernel/panic",
    "kernel/panic_on_oops",
    "kernel/keys/root_maxkeys",
    "kernel/keys/root_maxbytes",
];

/// A Kubernetes with one node. All of it is in the node's folder, but what a node has elsewhere, and the pods' logs.
///
/// Who has its `kubeconfig` may do everything; nobody else can reach it. Like the [`Node`] it takes everything along
/// when it is dropped, and [`Kubernetes::finish`] shows that nothing was left to be removed.
#[derive(Debug)]
pub struct Kubernetes {
    /// `kubectl proxy`: the API without a login.
    proxy: String,
    /// In the order in which they end.
    processes: Vec<Process>,
    _kernel: Kernel,
    /// The node.
    pub node: Node,
}

impl Kubernetes {
    /// Starts everything and waits until the node is ready.
    ///
    /// # Errors
    /// As [`Node::start`], and when a part of Kubernetes is missing or does not come up.
    pub async fn start(shim: Shim) -> Result<Self> {
        let kernel = Kernel::note();
        let node = Node::start_for_kubelet(shim).await?;
        let mut cluster = Self { proxy: String::new(), processes: Vec::new(), _kernel: kernel, node };
        cluster.start_control_plane().await?;
        cluster.start_kubelet()?;
        let ready = async || {
            let node = cluster.get(&format!("/api/v1/nodes/{NODE}")).await?;
            Ok(condition(&node, "Ready"))
        };
        eventually(START_DEADLINE, "the node is ready", ready, |ready| *ready).await?;
        Ok(cluster)
    }

    /// What `kubectl` needs to know.
    pub fn kubeconfig(&self) -> PathBuf {
        self.file("kubeconfig")
    }

    /// The node's name.
    pub fn node_name(&self) -> &'static str {
        NODE
    }

    /// Runs `kubectl`.
    ///
    /// # Errors
    /// As [`command::run`].
    pub async fn kubectl(&self, args: &[&str]) -> Result<command::Output> {
        self.kubectl_with(args, "").await
    }

    /// The same with `input` as its standard input.
    ///
    /// # Errors
    /// As [`command::run`].
    pub async fn kubectl_with(&self, args: &[&str], input: &str) -> Result<command::Output> {
        let (config, cache) = (self.kubeconfig(), self.file("kubectl"));
        let fixed = ["--kubeconfig", &*config.to_string_lossy(), "--cache-dir", &*cache.to_string_lossy()];
        let args = fixed.iter().chain(args).copied();
        command::run(tools::kubectl()?, args, input.as_bytes(), KUBECTL_DEADLINE).await
    }

    /// Makes objects, or changes them to be so.
    ///
    /// # Errors
    /// When Kubernetes refuses one.
    pub async fn apply(&self, objects: &str) -> Result<()> {
        self.kubectl_with(&["apply", "--filename", "-"], objects).await?.success().map(drop)
    }

    /// What the API has at a path.
    ///
    /// # Errors
    /// When it has nothing there.
    pub async fn get(&self, path: &str) -> Result<Value> {
        let answer = http::get(&format!("{}{path}", self.proxy)).await?;
        ensure!(answer.status == 200, "{path}: {} {}", answer.status, answer.body);
        serde_json::from_str(&answer.body).with_context(|| format!("{path}: no JSON"))
    }

    /// The pods of a namespace that have a label.
    ///
    /// # Errors
    /// When the API server is away.
    pub async fn pods(&self, namespace: &str, label: &str) -> Result<Vec<Value>> {
        let mut pods = self.get(&format!("/api/v1/namespaces/{namespace}/pods?labelSelector={label}")).await?;
        Ok(pods["items"].as_array_mut().map(std::mem::take).unwrap_or_default())
    }

    /// Waits until so many pods of a Deployment are ready, and there are no others.
    ///
    /// # Errors
    /// When it is not so at the deadline.
    pub async fn until_ready(&self, namespace: &str, deployment: &str, pods: u64, deadline: Duration) -> Result<()> {
        let path = format!("/apis/apps/v1/namespaces/{namespace}/deployments/{deployment}");
        let look = async || {
            let object = self.get(&path).await?;
            let count = |field: &str| object["status"][field].as_u64().unwrap_or_default();
            let observed = object["status"]["observedGeneration"] == object["metadata"]["generation"];
            Ok((observed, count("replicas"), count("updatedReplicas"), count("readyReplicas")))
        };
        let what = format!("{pods} pods of {deployment} are ready");
        eventually(deadline, &what, look, |seen| *seen == (true, pods, pods, pods)).await.map(drop)
    }

    /// Removes a namespace and waits until it and its pods are gone.
    ///
    /// # Errors
    /// When they are not after two minutes.
    pub async fn delete_namespace(&self, namespace: &str) -> Result<()> {
        self.kubectl(&["delete", "namespace", namespace, "--wait=false"]).await?.success()?;
        let gone = async || Ok(http::get(&format!("{}/api/v1/namespaces/{namespace}", self.proxy)).await?.status);
        eventually(DRAINED_DEADLINE, "the namespace is gone", gone, |status| *status == 404).await.map(drop)
    }

    /// Shows that no pod has left anything: no process, mount, cgroup, socket, no port of the bridge, no log. None may be
    /// left.
    ///
    /// # Errors
    /// When something remains; the error names it.
    pub async fn nothing_left(&self) -> Result<()> {
        let own: Vec<u32> = self.processes.iter().map(Process::id).collect();
        // The kubelet mounts its own folder onto itself.
        let own_mount = format!("mount {}", self.file(KUBELET).display());
        let look = async || {
            let mut left = self.node.left_beside(&own);
            left.retain(|found| *found != own_mount);
            Ok(left)
        };
        eventually(DRAINED_DEADLINE, "nothing is left of any pod", look, Vec::is_empty).await?;
        let logs = async || Ok(self.logs());
        eventually(DRAINED_DEADLINE, "no logs are left", logs, Vec::is_empty).await.map(drop)
    }

    /// Ends it; there must be no pods left. Shows that nothing remains, of the pods nor of Kubernetes.
    ///
    /// # Errors
    /// When something remains; the error names it.
    pub async fn finish(mut self) -> Result<()> {
        self.nothing_left().await?;
        for process in &mut self.processes {
            process.quiet();
            process.signal(rustix::process::Signal::TERM)?;
            process.wait(GONE_DEADLINE).await?;
        }
        // It is left so when the kubelet ends.
        unmount(self.file(KUBELET), UnmountFlags::empty()).context("unmount the kubelet's folder")?;
        let mounts = leftovers::mounts("self", self.node.folder());
        ensure!(mounts.is_empty(), "mounts are left: {mounts:?}");
        let Self { processes, node, .. } = self;
        drop(processes);
        node.finish().await
    }

    /// The folders and links of pods' logs.
    fn logs(&self) -> Vec<PathBuf> {
        let entries = |folder: &str| Path::new(folder).read_dir().into_iter().flatten().flatten();
        LOGS.iter().flat_map(|folder| entries(folder)).map(|entry| entry.path()).collect()
    }

    fn file(&self, name: &str) -> PathBuf {
        self.node.folder().join(name)
    }

    fn write(&self, name: &str, content: &str) -> Result<String> {
        let file = self.file(name);
        fs::write(&file, content).with_context(|| format!("write {}", file.display()))?;
        Ok(file.to_string_lossy().into_owned())
    }

    /// Starts a part; those that were started last are the first to end.
    fn spawn(&mut self, name: &str, executable: PathBuf, args: &[&str]) -> Result<()> {
        let mut command = Command::new(executable);
        command.args(args).current_dir(self.node.folder());
        self.processes.insert(0, Process::spawn(name, command)?);
        Ok(())
    }

    async fn start_control_plane(&mut self) -> Result<()> {
        let programs = tools::kubernetes()?;
        let (clients, peers, api) = (free_port()?, free_port()?, free_port()?);
        let (clients, peers) = (&format!("http://{clients}"), &format!("http://{peers}"));
        let data = self.file("etcd").to_string_lossy().into_owned();
        #[rustfmt::skip]
        let args = [
            "--data-dir", &data, "--listen-client-urls", clients, "--advertise-client-urls", clients,
            "--listen-peer-urls", peers, "--initial-advertise-peer-urls", peers,
            "--initial-cluster", &format!("default={peers}"),
        ];
        self.spawn("etcd", tools::etcd()?, &args)?;

        let token: String = std::iter::repeat_with(fastrand::alphanumeric).take(32).collect();
        let tokens = self.write("tokens", &format!("{token},admin,admin,system:masters\n"))?;
        let key = self.file("service-account.key").to_string_lossy().into_owned();
        let openssl = tools::installed("openssl", "openssl")?;
        let args = ["ecparam", "-genkey", "-noout", "-name", "prime256v1", "-out", &key];
        command::run(openssl, args, b"", START_DEADLINE).await?.success()?;
        let certificates = self.file("certificates").to_string_lossy().into_owned();
        let port = api.rsplit(':').next().context("a port")?;
        let args = [
            format!("--etcd-servers={clients}"),
            "--bind-address=127.0.0.1".to_owned(),
            format!("--secure-port={port}"),
            // It makes a certificate of its own there.
            format!("--cert-dir={certificates}"),
            format!("--token-auth-file={tokens}"),
            "--authorization-mode=AlwaysAllow".to_owned(),
            "--service-account-issuer=https://mailroom.local".to_owned(),
            format!("--service-account-key-file={key}"),
            format!("--service-account-signing-key-file={key}"),
            "--service-cluster-ip-range=10.96.0.0/16".to_owned(),
            "--kubelet-preferred-address-types=InternalIP".to_owned(),
        ];
        self.spawn("kube-apiserver", programs.join("kube-apiserver"), &args.each_ref().map(String::as_str))?;

        let config = json!({
            "apiVersion": "v1",
            "kind": "Config",
            "clusters": [{
                "name": "mailroom",
                "cluster": { "server": format!("https://{api}"), "insecure-skip-tls-verify": true },
            }],
            "users": [{ "name": "admin", "user": { "token": token } }],
            "contexts": [{ "name": "mailroom", "context": { "cluster": "mailroom", "user": "admin" } }],
            "current-context": "mailroom",
        });
        let config = self.write("kubeconfig", &config.to_string())?;
        let ready = async || self.kubectl(&["get", "--raw", "/readyz"]).await?.success();
        eventually(START_DEADLINE, "the API server is ready", ready, |_| true).await?;
        self.spawn("kubectl proxy", tools::kubectl()?, &["proxy", "--port=0", "--kubeconfig", &config])?;
        let line = self.processes[0].wait_for_line(START_DEADLINE, |line| line.contains("serve on ")).await?;
        self.proxy = format!("http://{}", line.rsplit(' ').next().context("an address")?);

        let kubeconfig = format!("--kubeconfig={config}");
        let common = [kubeconfig.as_str(), "--leader-elect=false", "--port=0", "--secure-port=0"];
        self.spawn("kube-scheduler", programs.join("kube-scheduler"), &common)?;
        let key = format!("--service-account-private-key-file={key}");
        let args = [&common[..], &[&key]].concat();
        self.spawn("kube-controller-manager", programs.join("kube-controller-manager"), &args)
    }

    fn start_kubelet(&mut self) -> Result<()> {
        let address = self.node.address().to_string();
        let port: u16 = free_port()?.rsplit(':').next().context("a port")?.parse()?;
        let config = json!({
            "apiVersion": "kubelet.config.k8s.io/v1beta1",
            "kind": "KubeletConfiguration",
            "address": address,
            "port": port,
            "healthzPort": 0,
            "authentication": { "anonymous": { "enabled": true }, "webhook": { "enabled": false } },
            "authorization": { "mode": "AlwaysAllow" },
            "cgroupDriver": "cgroupfs",
            "cgroupRoot": format!("/{}", self.node.cgroups.first()),
            "enforceNodeAllocatable": [],
            "failSwapOn": false,
            // It has to live on a full disk, and to leave the images alone.
            "evictionHard": { "memory.available": "50Mi" },
            "imageGCHighThresholdPercent": 100,
            "imageGCLowThresholdPercent": 99,
            "resolvConf": self.write("resolv.conf", "nameserver 198.18.0.53\n")?,
            "volumePluginDir": self.file("plugins"),
            "featureGates": { "DevicePlugins": false },
            // The machine's firewall is not ours.
            "makeIPTablesUtilChains": false,
            // It takes a capability to be spared when memory is short, which many containers that tests run in lack.
            "oomScoreAdj": 0,
            // The defaults since 1.27. Those of this version, a tenth, let thirty pods wait for their status.
            "kubeAPIQPS": 50,
            "kubeAPIBurst": 100,
            "eventRecordQPS": 50,
            "eventBurst": 100,
        });
        let config = self.write("kubelet.yaml", &config.to_string())?;
        let (socket, kubeconfig) = (self.node.socket(), self.kubeconfig());
        let args = [
            format!("--config={config}"),
            format!("--kubeconfig={}", kubeconfig.display()),
            "--container-runtime=remote".to_owned(),
            format!("--container-runtime-endpoint=unix://{}", socket.display()),
            format!("--root-dir={}", self.file(KUBELET).display()),
            format!("--cert-dir={}", self.file("kubelet-certificates").display()),
            format!("--hostname-override={NODE}"),
            format!("--node-ip={address}"),
        ];
        self.spawn("kubelet", tools::kubernetes()?.join("kubelet"), &args.each_ref().map(String::as_str))
    }
}

/// Whether an object has a condition.
fn condition(object: &Value, kind: &str) -> bool {
    let mut conditions = object["status"]["conditions"].as_array().into_iter().flatten();
    conditions.any(|condition| condition["type"] == kind && condition["status"] == "True")
}

/// Settings of the kernel as they were, and as they are again when this is dropped.
#[derive(Debug)]
struct Kernel(Vec<(PathBuf, String)>);

impl Kernel {
    fn note() -> Self {
        let files = KERNEL.iter().map(|name| Path::new("/proc/sys").join(name));
        Self(files.filter_map(|file| fs::read_to_string(&file).ok().map(|value| (file, value))).collect())
    }
}

impl Drop for Kernel {
    fn drop(&mut self) {
        for (file, value) in &self.0 {
            // What could not be set was not set by a kubelet either.
            _ = fs::write(file, value);
        }
    }
}
