//! `containerd-shim-mailroom-v1`: gives a pod's WebAssembly container to Mailroom's host, and every other container to
//! runc as it is.
//!
//! containerd starts one of these for each pod and speaks task API v2 with it: [`service`]. A [`container`] is made by
//! [`runc`] in the pod's namespaces and cgroup, with the privileges of its specification; of a wasm container the
//! [`bundle`] is changed so that its process is the host, and its [`component`] is compiled once a node, confined.

mod bundle;
mod cgroup;
mod component;
mod container;
mod options;
mod process;
mod reaper;
mod runc;
mod service;
mod stdio;

use containerd_shim::Config;
use std::process::ExitCode;

const RUNTIME: &str = "io.containerd.mailroom.v1";

const USAGE: &str = "containerd starts this executable; it is not run by hand.

Put it, with mailroom-host and mailroom-compiler beside it, into a folder on containerd's PATH, and name the runtime
io.containerd.mailroom.v1 in containerd's configuration. By hand:

  ctr run --rm --runtime io.containerd.mailroom.v1 IMAGE NAME";

fn main() -> ExitCode {
    match std::env::args().nth(1).as_deref() {
        None | Some("-h" | "--help" | "help") => {
            println!("{USAGE}");
            return ExitCode::SUCCESS;
        }
        Some("--version" | "-version") => {
            println!("containerd-shim-mailroom-v1 {}", version::LONG);
            return ExitCode::SUCCESS;
        }
        Some("-V" | "-v") => {
            println!("containerd-shim-mailroom-v1 {}", version::SHORT);
            return ExitCode::SUCCESS;
        }
        Some(_) => {}
    }
    let runtime = match tokio::runtime::Builder::new_current_thread().enable_all().build() {
        Ok(runtime) => runtime,
        Err(err) => {
            eprintln!("error: start the runtime: {err}");
            return ExitCode::FAILURE;
        }
    };
    // The children's ends are awaited here, each by its own process descriptor.
    let config = Config { no_reaper: true, ..Config::default() };
    runtime.block_on(containerd_shim::asynchronous::run::<service::Service>(RUNTIME, Some(config)));
    ExitCode::SUCCESS
}
