//! The shim under a containerd, called as a kubelet calls it, one module per concern.
//!
//! Real parts throughout: each test has its own containerd with runc, its own network, its own nats-server. `cargo
//! xtask test` builds and installs what they need; a missing part fails the test with the command that makes it. Those
//! of the module [`kubernetes`] need more, and are run by `cargo xtask test-kubernetes`.

mod compiled;
mod confined;
mod harness;
mod images;
mod interrupted;
mod kubernetes;
mod lifecycle;
mod refused;
mod resources;
mod site;
mod systemd;
mod triage;
