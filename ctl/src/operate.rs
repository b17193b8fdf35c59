//! `kmorphctl policy`, `group`, `maintenance`, `events` and `config`.

use std::collections::BTreeMap;
use std::path::Path;

use kmorph_config::{Paths, Setting, import_policies, load};
use kmorph_control::{
    Client, ErrorKind, EventView, EventsArgs, GroupView, InstanceView, Next, OpError, PolicyChange,
    PolicyView, Request,
};
use serde::Serialize;

use crate::args::{ConfigCommand, Destination, Events, Group, Maintenance, Policy};
use crate::output::{Output, operate as show};

pub async fn policy(command: &Policy, socket: &Path, out: &Output) -> Result<(), OpError> {
    match command {
        Policy::Show { instance } => {
            let request = Request::PolicyShow { instance: instance.clone() };
            let view: PolicyView = Client::connect(socket).await?.call(&request).await?;
            out.show(&view, show::policy)
        }
        Policy::Set { key, instance, value } => set(key, instance, Some(value), socket, out).await,
        Policy::Unset { key, instance } => set(key, instance, None, socket, out).await,
        Policy::Export { file, output } => {
            let file = match (file, output) {
                (Some(one), Destination::File(other)) => {
                    return Err(OpError::new(
                        ErrorKind::Usage,
                        format!("there are two files to write: {} and {}", one.display(), other.display()),
                    ));
                }
                (Some(file), _) | (None, Destination::File(file)) => Some(file.as_path()),
                (None, Destination::Format(_)) => None,
            };
            export(file, socket, out).await
        }
        Policy::Import { file, dry_run } => {
            let name = file.display().to_string();
            let text = std::fs::read_to_string(file)
                .map_err(|e| OpError::new(ErrorKind::NotFound, format!("cannot read {name}: {e}")))?;
            let request = Request::PolicyImport { text, file: name, dry_run: *dry_run };
            let diff: Vec<PolicyChange> = Client::connect(socket).await?.call(&request).await?;
            out.show(&diff, |d| show::changes(d, *dry_run))
        }
    }
}

async fn set(
    key: &str,
    instance: &str,
    value: Option<&String>,
    socket: &Path,
    out: &Output,
) -> Result<(), OpError> {
    let request = Request::PolicySet { instance: instance.into(), key: key.into(), value: value.cloned() };
    let diff: Vec<PolicyChange> = Client::connect(socket).await?.call(&request).await?;
    out.show(&diff, |d| show::changes(d, false))
}

async fn export(file: Option<&Path>, socket: &Path, out: &Output) -> Result<(), OpError> {
    let text: String = Client::connect(socket).await?.call(&Request::PolicyExport).await?;
    let Some(file) = file else {
        // JSON is YAML: both forms can be imported.
        let policies = import_policies(&text, "kmorphd's answer")?;
        return out.show(&BTreeMap::from([("policies", policies)]), |_| text);
    };
    std::fs::write(file, &text)
        .map_err(|e| OpError::new(ErrorKind::Internal, format!("cannot write {}: {e}", file.display())))?;
    out.show(&serde_json::json!({ "file": file }), |_| format!("written to {}\n", file.display()))
}

pub async fn group(command: &Group, socket: &Path, out: &Output) -> Result<(), OpError> {
    let mut client = Client::connect(socket).await?;
    match command {
        Group::List => {
            let all: Vec<GroupView> = client.call(&Request::GroupList).await?;
            out.show(&all, |a| show::groups(a))
        }
        Group::Show { group } => {
            let view: GroupView = client.call(&Request::GroupShow { name: group.clone() }).await?;
            out.show(&view, show::group)
        }
    }
}

pub async fn maintenance(command: &Maintenance, socket: &Path, out: &Output) -> Result<(), OpError> {
    let (name, on) = match command {
        Maintenance::On { instance } => (instance, true),
        Maintenance::Off { instance } => (instance, false),
    };
    let request = Request::Maintenance { name: name.clone(), on };
    let view: InstanceView = Client::connect(socket).await?.call(&request).await?;
    out.show(&view, |v| match v.maintenance {
        true => format!(
            "{0} is in maintenance: watched, not acted on; end it with kmorphctl maintenance off {0}\n",
            v.name
        ),
        false => format!("{} is acted on again; it is {}\n", v.name, v.state),
    })
}

pub async fn events(args: &Events, socket: &Path, out: &Output) -> Result<(), OpError> {
    let filter =
        EventsArgs { instance: args.instance.clone(), incident: args.incident, since_unix_ms: args.since };
    let mut client = Client::connect(socket).await?;
    client.start(&Request::Events { filter, follow: args.follow }).await?;
    let mut none = true;
    while let Next::Item(event) = client.next::<EventView, ()>().await? {
        out.item(&event, show::event)?;
        none = false;
    }
    if none {
        out.note("no such events since kmorphd was started; older recoveries: kmorphctl recovery-log");
    }
    Ok(())
}

/// What `config check` found.
#[derive(Serialize)]
struct Checked {
    files: Vec<String>,
    settings: Vec<Setting>,
}

pub fn config(command: &ConfigCommand, out: &Output) -> Result<(), OpError> {
    let ConfigCommand::Check { file } = command;
    let paths = Paths::current();
    // All mistakes, each on a line of its own.
    let loaded = load(file.as_deref(), &paths).map_err(|e| OpError::new(e.kind, e.full()))?;
    let files = loaded.files.iter().map(|f| f.display().to_string()).collect();
    let checked = Checked { files, settings: loaded.settings };
    out.show(&checked, |c| show::config(&c.files, &c.settings, &paths.config))
}
