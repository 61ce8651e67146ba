//! The end-to-end tests, one module per concern, in one binary.
//!
//! Real parts throughout: each test has its own nats-server and its own host process. `cargo xtask test` builds and
//! fetches what they need; a missing part fails the test with the command that makes it.

mod chart;
mod crafted;
mod dead;
mod documents;
mod faults;
mod harness;
mod hostile_components;
mod hostile_messages;
mod images;
mod keyvalue;
mod lifecycle;
mod load;
mod made_again;
mod manifests;
mod messages;
mod offline;
mod parking;
mod permissions;
mod provision;
mod replacement;
mod requests;
mod scaler;
mod serve;
mod simulation;
mod startup;
mod steady;
mod triage;
