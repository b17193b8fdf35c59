//! `kmorphctl morph`.

use std::path::Path;

use kmorph_control::{Client, ErrorKind, MorphArgs, MorphGoal, MorphView, OpError, Request};

use crate::args::{Morph, MorphStep, NewKernel};
use crate::commands::file;
use crate::output::{Output, morph as show};

pub async fn run(command: &Morph, socket: &Path, out: &Output) -> Result<(), OpError> {
    let request = match (&command.step, &command.instance, &command.kernel) {
        (Some(step), ..) => request(step)?,
        (None, Some(instance), Some(kernel)) => {
            let goal = if command.auto_commit { MorphGoal::Commit } else { MorphGoal::Validate };
            Request::Morph(begin(instance, kernel, &command.new, goal, command.dry_run)?)
        }
        (None, ..) => return Err(OpError::new(ErrorKind::Usage, "morph: name an instance and a kernel")),
    };
    let dry_run = matches!(&request, Request::Morph(MorphArgs { dry_run: true, .. }));
    let view: MorphView = Client::connect(socket).await?.call(&request).await?;
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
        goal,
        dry_run,
    })
}
