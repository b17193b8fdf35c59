//! `kmorphctl morph`.

use std::path::Path;

use kmorph_control::{
    Client, ErrorKind, GroupMorph, MorphArgs, MorphGoal, MorphGroupArgs, MorphView, OpError, Request,
};

use crate::args::{Morph, MorphStep, NewKernel};
use crate::commands::file;
use crate::output::{Output, morph as show};
use crate::progress;

pub async fn run(command: &Morph, socket: &Path, out: &Output) -> Result<(), OpError> {
    if let Some(MorphStep::Group { group, kernel, commit, one_by_one, rollback }) = &command.step {
        let what = match (rollback, commit) {
            (true, _) => GroupMorph::Rollback,
            (false, true) => GroupMorph::Commit,
            (false, false) => GroupMorph::Validate,
        };
        let kernel = kernel.as_deref().map(|k| file("kernel", k)).transpose()?;
        let (group, one_by_one) = (group.clone(), *one_by_one);
        let request = Request::MorphGroup(MorphGroupArgs { group, kernel, what, one_by_one });
        let views: Vec<MorphView> = Client::connect(socket).await?.call(&request).await?;
        return out.show(&views, |all| all.iter().map(show::morph).collect::<Vec<_>>().join("\n"));
    }
    let request = match (&command.step, &command.instance, &command.kernel) {
        (Some(step), ..) => request(step)?,
        (None, Some(instance), Some(kernel)) => {
            let goal = if command.auto_commit { MorphGoal::Commit } else { MorphGoal::Validate };
            Request::Morph(begin(instance, kernel, &command.new, goal, command.dry_run)?)
        }
        (None, ..) => return Err(OpError::new(ErrorKind::Usage, "morph: name an instance and a kernel")),
    };
    let dry_run = matches!(&request, Request::Morph(MorphArgs { dry_run: true, .. }));
    let waits_for = match &request {
        Request::Morph(m) if !m.dry_run => Some(m.name.clone()),
        Request::MorphRollback { name } => Some(name.clone()),
        _ => None,
    };
    let mut client = Client::connect(socket).await?;
    let view: MorphView = progress::shown(waits_for.as_deref(), socket, client.call(&request)).await?;
    out.show(&view, |v| if dry_run { show::plan(v) } else { show::morph(v) })
}

fn request(step: &MorphStep) -> Result<Request, OpError> {
    let go = |name: &String, goal| {
        Request::Morph(MorphArgs {
            name: name.clone(),
            kernel: None,
            cmdline: None,
            initramfs: None,
            cpus: vec![],
            memory_bytes: None,
            goal,
            dry_run: false,
        })
    };
    Ok(match step {
        MorphStep::Prepare { instance, kernel, new, dry_run } => {
            Request::Morph(begin(instance, kernel, new, MorphGoal::Prepare, *dry_run)?)
        }
        MorphStep::Validate { instance } => go(instance, MorphGoal::Validate),
        MorphStep::Commit { instance } => go(instance, MorphGoal::Commit),
        MorphStep::Rollback { instance } => Request::MorphRollback { name: instance.clone() },
        MorphStep::Group { .. } => {
            return Err(OpError::new(ErrorKind::Usage, "morph group is not of one instance"));
        }
        MorphStep::Status { instance } => Request::MorphStatus { name: instance.clone() },
    })
}

fn begin(
    name: &str,
    kernel: &Path,
    new: &NewKernel,
    goal: MorphGoal,
    dry_run: bool,
) -> Result<MorphArgs, OpError> {
    Ok(MorphArgs {
        name: name.to_owned(),
        kernel: Some(file("kernel", kernel)?),
        cmdline: new.kernel_cmdline.clone(),
        initramfs: new.initramfs.as_deref().map(|p| file("initramfs", p)).transpose()?,
        cpus: new.cpus.clone(),
        memory_bytes: new.memory,
        goal,
        dry_run,
    })
}
