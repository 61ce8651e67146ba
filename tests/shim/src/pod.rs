use crate::cgroup::Limits;
use crate::container::ContainerBuilder;
use crate::node::{GONE_DEADLINE, Node};
use anyhow::{Context as _, Result};
use k8s_cri::v1::{
    DnsConfig, LinuxPodSandboxConfig, LinuxSandboxSecurityContext, NamespaceMode, NamespaceOption, PodSandboxConfig,
    PodSandboxMetadata, PodSandboxStatusRequest, RemovePodSandboxRequest, RunPodSandboxRequest, StopPodSandboxRequest,
};
use serde_json::Value;
use std::collections::HashMap;
use std::fs;
use std::path::PathBuf;
use std::sync::atomic::{AtomicU64, Ordering};
use tests::eventually;

/// A pod that runs, until it is removed or its node is.
#[derive(Debug)]
pub struct Pod<'a> {
    pub(crate) node: &'a Node,
    pub(crate) id: String,
    pub(crate) config: PodSandboxConfig,
}

/// What a pod is run with: a network of its own, no limits.
#[derive(Clone, Debug)]
pub struct PodBuilder<'a> {
    node: &'a Node,
    handler: String,
    network: NamespaceMode,
    limits: Limits,
    hostname: String,
    dns: DnsConfig,
}

/// Makes pods' names.
static COUNT: AtomicU64 = AtomicU64::new(0);

impl<'a> PodBuilder<'a> {
    pub(crate) fn new(node: &'a Node, handler: &str) -> Self {
        Self {
            node,
            handler: handler.to_owned(),
            network: NamespaceMode::Pod,
            limits: Limits::default(),
            hostname: "pod".to_owned(),
            dns: DnsConfig::default(),
        }
    }

    /// Leaves the pod in the network of the node.
    #[must_use]
    pub fn host_network(self) -> Self {
        Self { network: NamespaceMode::Node, ..self }
    }

    /// Bounds what its containers use in all.
    #[must_use]
    pub fn limits(self, limits: Limits) -> Self {
        Self { limits, ..self }
    }

    /// Gives the pod a name.
    #[must_use]
    pub fn hostname(self, hostname: &str) -> Self {
        Self { hostname: hostname.to_owned(), ..self }
    }

    /// Says whom the pod asks for names, and what it adds to those without a dot.
    #[must_use]
    pub fn dns(self, server: &str, search: &[&str]) -> Self {
        let searches = search.iter().map(|&domain| domain.to_owned()).collect();
        Self {
            dns: DnsConfig { servers: vec![server.to_owned()], searches, options: vec!["ndots:5".to_owned()] },
            ..self
        }
    }

    /// Runs the pod's sandbox.
    ///
    /// # Errors
    /// When containerd or the shim refuses.
    pub async fn run(self) -> Result<Pod<'a>> {
        let number = COUNT.fetch_add(1, Ordering::Relaxed);
        let uid = format!("0000-{number:04}");
        let name = format!("pod-{number}");
        let logs = self.node.folder().join("logs").join(&name);
        fs::create_dir_all(&logs).with_context(|| format!("make {}", logs.display()))?;
        let security_context =
            LinuxSandboxSecurityContext { namespace_options: Some(namespaces(self.network)), ..Default::default() };
        let config = PodSandboxConfig {
            metadata: Some(PodSandboxMetadata { name, uid: uid.clone(), namespace: "default".to_owned(), attempt: 0 }),
            hostname: if self.network == NamespaceMode::Node { String::new() } else { self.hostname },
            log_directory: logs.to_string_lossy().into_owned(),
            dns_config: Some(self.dns),
            linux: Some(LinuxPodSandboxConfig {
                cgroup_parent: self.node.make_cgroup(&uid, self.limits)?,
                security_context: Some(security_context),
                ..Default::default()
            }),
            ..Default::default()
        };
        let request = RunPodSandboxRequest { config: Some(config.clone()), runtime_handler: self.handler };
        let id = self.node.runtime().run_pod_sandbox(request).await.context("run the pod's sandbox")?;
        let id = id.into_inner().pod_sandbox_id;
        self.node.note_sockets();
        Ok(Pod { node: self.node, id, config })
    }
}

impl<'a> Pod<'a> {
    /// The id of its sandbox.
    pub fn id(&self) -> &str {
        &self.id
    }

    /// The path of its cgroup.
    pub fn cgroup(&self) -> &str {
        self.config.linux.as_ref().map_or("", |linux| &linux.cgroup_parent)
    }

    /// Prepares a container of the pod from the image `mailroom.local/IMAGE:1`.
    pub fn container(&self, image: &str) -> ContainerBuilder<'_> {
        ContainerBuilder::new(self, image)
    }

    /// The pod's address in its own network.
    ///
    /// # Errors
    /// When it has none.
    pub async fn address(&self) -> Result<String> {
        let request = PodSandboxStatusRequest { pod_sandbox_id: self.id.clone(), verbose: false };
        let status = self.node.runtime().pod_sandbox_status(request).await?.into_inner().status;
        let address = status.and_then(|status| status.network).map(|network| network.ip);
        address.filter(|address| !address.is_empty()).context("the pod has no address")
    }

    /// The process that holds its namespaces.
    ///
    /// # Errors
    /// When there is none.
    pub async fn pid(&self) -> Result<u32> {
        let request = PodSandboxStatusRequest { pod_sandbox_id: self.id.clone(), verbose: true };
        pid_in(&self.node.runtime().pod_sandbox_status(request).await?.into_inner().info).context("of the sandbox")
    }

    /// Stops all containers of the pod, then its sandbox, as a kubelet's last call does.
    ///
    /// # Errors
    /// When containerd or the shim refuses.
    pub async fn stop(&self) -> Result<()> {
        let request = StopPodSandboxRequest { pod_sandbox_id: self.id.clone() };
        self.node.runtime().stop_pod_sandbox(request).await.context("stop the pod's sandbox")?;
        Ok(())
    }

    /// Stops and removes the pod and its cgroup.
    ///
    /// # Errors
    /// When containerd or the shim refuses, or a container's cgroup is left.
    pub async fn remove(self) -> Result<()> {
        self.stop().await?;
        let request = RemovePodSandboxRequest { pod_sandbox_id: self.id.clone() };
        self.node.runtime().remove_pod_sandbox(request).await.context("remove the pod's sandbox")?;
        let uid = self.config.metadata.map(|metadata| metadata.uid).unwrap_or_default();
        // What is killed leaves a moment later, and a kubelet tries again too.
        let remove = async || self.node.cgroups.remove_pod(&uid);
        eventually(GONE_DEADLINE, "the cgroup of the pod is removed", remove, |()| true).await
    }

    pub(crate) fn network(&self) -> NamespaceMode {
        let security = self.config.linux.as_ref().and_then(|linux| linux.security_context.as_ref());
        let namespaces = security.and_then(|security| security.namespace_options.as_ref());
        namespaces.map_or(NamespaceMode::Pod, NamespaceOption::network)
    }

    pub(crate) fn logs(&self) -> PathBuf {
        self.config.log_directory.clone().into()
    }
}

/// The process id in a verbose status.
pub(crate) fn pid_in(info: &HashMap<String, String>) -> Result<u32> {
    let info: Value = serde_json::from_str(info.get("info").context("no verbose status")?)?;
    let pid = info["pid"].as_u64().and_then(|pid| u32::try_from(pid).ok());
    pid.filter(|&pid| pid > 0).context("no process")
}

/// Kubernetes' default: containers of a pod share all but their processes.
pub(crate) fn namespaces(network: NamespaceMode) -> NamespaceOption {
    NamespaceOption {
        network: network.into(),
        pid: NamespaceMode::Container.into(),
        ipc: NamespaceMode::Pod.into(),
        ..Default::default()
    }
}
