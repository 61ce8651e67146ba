//! A container's bundle: the folder with its `config.json` (OCI runtime specification) and its root file system.

use anyhow::{Context as _, Result, ensure};
use serde_json::{Value, json};
use std::path::{Path, PathBuf};

/// Whose containers share one shim.
const SANDBOX_ID: &str = "io.kubernetes.cri.sandbox-id";

/// `sandbox` for the container that holds a pod's namespaces, `container` for all others.
const CONTAINER_TYPE: &str = "io.kubernetes.cri.container-type";

/// Where the container finds what it is run by.
const HOST_INSIDE: &str = "/.mailroom/host";
const COMPONENT_INSIDE: &str = "/.mailroom/component.cwasm";

/// A container's specification. Only what is changed is understood; everything else stays as it is.
pub struct Bundle {
    /// Its folder.
    pub path: PathBuf,
    spec: Value,
}

/// What runs a container.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Workload {
    /// Itself: a sidecar, a pod's sandbox.
    Native,
    /// The host, with the component at this path inside of the container.
    Component(PathBuf),
    /// The same, with one that its image brings compiled.
    Compiled(PathBuf),
}

impl Bundle {
    /// Reads the specification.
    ///
    /// # Errors
    /// There is none, or it is no JSON.
    pub fn open(path: &Path) -> Result<Self> {
        let file = path.join("config.json");
        let text = std::fs::read(&file).with_context(|| format!("read {}", file.display()))?;
        let spec = serde_json::from_slice(&text).with_context(|| format!("read {}", file.display()))?;
        Ok(Self { path: path.to_path_buf(), spec })
    }

    /// The container's root file system.
    pub fn rootfs(&self) -> PathBuf {
        self.path.join("rootfs")
    }

    /// The pod that the container is of, if it is of one.
    pub fn sandbox(&self) -> Option<&str> {
        self.spec["annotations"][SANDBOX_ID].as_str()
    }

    /// Where the container's cgroup is to be: a path, or `SLICE:PREFIX:NAME` for systemd.
    pub fn cgroups_path(&self) -> &str {
        self.spec["linux"]["cgroupsPath"].as_str().unwrap_or_default()
    }

    /// Whether the end of its first process is the end of all of them.
    pub fn has_own_processes(&self) -> bool {
        let namespaces = self.spec["linux"]["namespaces"].as_array();
        let is_own =
            |namespace: &Value| namespace["type"] == "pid" && namespace["path"].as_str().is_none_or(str::is_empty);
        namespaces.is_some_and(|namespaces| namespaces.iter().any(is_own))
    }

    /// What runs it: its entrypoint says it.
    pub fn workload(&self) -> Workload {
        let Some(entrypoint) = self.spec["process"]["args"][0].as_str() else { return Workload::Native };
        if self.spec["annotations"][CONTAINER_TYPE] == "sandbox" {
            return Workload::Native;
        }
        let path = Path::new(self.spec["process"]["cwd"].as_str().unwrap_or("/")).join(entrypoint);
        match path.extension().and_then(|extension| extension.to_str()) {
            Some("wasm") => Workload::Component(path),
            Some("cwasm") => Workload::Compiled(path),
            _ => Workload::Native,
        }
    }

    /// Makes the executable `host` the container's process, and machine code its component: a file outside of the
    /// container, or its own entrypoint.
    ///
    /// # Errors
    /// A specification without arguments, a bundle that cannot be written to.
    pub fn run_with(&mut self, host: &Path, machine_code: Option<&Path>) -> Result<()> {
        let mounts = self.spec["mounts"].as_array_mut().context("the specification has no mounts")?;
        let mut add = |source: &Path, destination: &str| {
            mounts.push(json!({
                "type": "bind", "source": source, "destination": destination,
                "options": ["bind", "ro", "nosuid", "nodev"],
            }));
        };
        add(host, HOST_INSIDE);
        if let Some(machine_code) = machine_code {
            add(machine_code, COMPONENT_INSIDE);
        }
        let args = self.spec["process"]["args"].as_array_mut().context("the specification has no arguments")?;
        ensure!(!args.is_empty(), "the specification has no entrypoint");
        let entrypoint = args.remove(0);
        let component = machine_code.map_or(entrypoint, |_| COMPONENT_INSIDE.into());
        args.splice(0..0, [HOST_INSIDE.into(), "run".into(), "--component".into(), component]);
        let file = self.path.join("config.json");
        std::fs::write(&file, serde_json::to_vec(&self.spec)?).with_context(|| format!("write {}", file.display()))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn bundle(spec: Value) -> Bundle {
        Bundle { path: "/nowhere".into(), spec }
    }

    #[test]
    fn the_entrypoint_says_what_runs_a_container() {
        let component = |path: &str| Workload::Component(path.into());
        for (args, cwd, kind, workload) in [
            (json!(["/triage.wasm", "--shards", "1"]), "/", "container", component("/triage.wasm")),
            (json!(["triage.wasm"]), "/app", "container", component("/app/triage.wasm")),
            (json!(["/triage.cwasm"]), "/", "container", Workload::Compiled("/triage.cwasm".into())),
            (json!(["/sidecar", "/triage.wasm"]), "/", "container", Workload::Native),
            (json!(["/triage.wasm"]), "/", "sandbox", Workload::Native),
            (json!(["wasm"]), "/", "container", Workload::Native),
            (json!([]), "/", "container", Workload::Native),
            (Value::Null, "/", "container", Workload::Native),
        ] {
            let spec = json!({ "process": { "args": args, "cwd": cwd }, "annotations": { CONTAINER_TYPE: kind } });
            assert_eq!(bundle(spec.clone()).workload(), workload, "{spec}");
        }
    }

    #[test]
    fn only_the_arguments_and_the_mounts_change() {
        let folder = tempfile::tempdir().expect("a folder");
        let spec = json!({
            "ociVersion": "1.0.2", "unknown": { "to": "us" },
            "process": { "args": ["/triage.wasm", "--shards", "1"], "cwd": "/", "user": { "uid": 65532 } },
            "mounts": [{ "destination": "/proc" }],
        });
        std::fs::write(folder.path().join("config.json"), spec.to_string()).expect("write");
        let mut bundle = Bundle::open(folder.path()).expect("a bundle");
        bundle.run_with(Path::new("/opt/mailroom-host"), Some(Path::new("/cache/1.cwasm"))).expect("changed");
        let mut expected = spec;
        expected["process"]["args"] =
            json!(["/.mailroom/host", "run", "--component", "/.mailroom/component.cwasm", "--shards", "1"]);
        for (source, destination) in [("/opt/mailroom-host", HOST_INSIDE), ("/cache/1.cwasm", COMPONENT_INSIDE)] {
            let options = json!(["bind", "ro", "nosuid", "nodev"]);
            let mount = json!({ "type": "bind", "source": source, "destination": destination, "options": options });
            expected["mounts"].as_array_mut().expect("mounts").push(mount);
        }
        assert_eq!(Bundle::open(folder.path()).expect("a bundle").spec, expected);
    }

    #[test]
    fn a_process_namespace_is_own_or_shared() {
        for (namespaces, own) in [
            (json!([{ "type": "pid" }]), true),
            (json!([{ "type": "pid", "path": "/proc/1/ns/pid" }]), false),
            (json!([{ "type": "mount" }]), false),
            (Value::Null, false),
        ] {
            assert_eq!(bundle(json!({ "linux": { "namespaces": namespaces } })).has_own_processes(), own);
        }
    }
}
