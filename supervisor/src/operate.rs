//! Requests about policies, groups, maintenance, morphs and events.

use kmorph_actors::{Key, wanted};
use kmorph_config::{export_policies, import_policies};
use kmorph_control::{ErrorKind, EventsArgs, OpError, Request, encode};
use tokio::sync::broadcast;

use crate::server::Client;
use crate::service::Service;

impl Service {
    /// Carry one of these out; the result is encoded. `None`: it is none of these.
    pub async fn operate(&self, request: &Request, client: &mut Client) -> Option<Result<Vec<u8>, OpError>> {
        Some(match request {
            Request::DaemonReload => {
                self.configured.reload(&self.tree, &self.store).await.and_then(|v| encode(&v))
            }
            Request::PolicyShow { instance } => {
                self.tree.policy_view(instance.as_deref()).await.and_then(|v| encode(&v))
            }
            Request::PolicySet { instance, key, value } => {
                self.policy_set(instance, key, value.as_deref()).await
            }
            Request::PolicyExport => export_policies(&self.tree.policy_export())
                .map_err(|e| OpError::new(ErrorKind::Internal, format!("write the policies: {e}")))
                .and_then(|text| encode(&text)),
            Request::PolicyImport { text, file, dry_run } => match import_policies(text, file) {
                Ok(policies) => {
                    self.tree.policy_import(policies, *dry_run).await.and_then(|diff| encode(&diff))
                }
                Err(e) => Err(OpError::new(e.kind, e.full())),
            },
            Request::GroupList => self.tree.groups().await.and_then(|v| encode(&v)),
            Request::GroupShow { name } => self.tree.group(name).await.and_then(|v| encode(&v)),
            Request::Maintenance { name, on } => {
                self.tree.maintenance(name, *on).await.and_then(|v| encode(&v))
            }
            Request::Morph(args) => self.tree.morph(args.clone()).await.and_then(|v| encode(&v)),
            Request::MorphRollback { name } => self.tree.morph_rollback(name).await.and_then(|v| encode(&v)),
            Request::MorphGroup(args) => self.tree.morph_group(args).await.and_then(|v| encode(&v)),
            Request::MorphStatus { name } => self.tree.morph_status(name).await.and_then(|v| encode(&v)),
            Request::Events { filter, follow } => {
                self.events(filter, *follow, client).await.and_then(|()| encode(&()))
            }
            _ => return None,
        })
    }

    async fn policy_set(&self, instance: &str, key: &str, value: Option<&str>) -> Result<Vec<u8>, OpError> {
        let key: Key = key
            .parse()
            .map_err(|e: kmorph_actors::PolicyError| OpError::new(ErrorKind::Usage, e.to_string()))?;
        self.tree.policy_set(instance, key, value).await.and_then(|diff| encode(&diff))
    }

    async fn events(&self, filter: &EventsArgs, follow: bool, client: &mut Client) -> Result<(), OpError> {
        if let Some(name) = &filter.instance {
            self.tree.status(name).await?; // an unknown name is an error, not silence
        }
        // Subscribed before the past is read, so nothing falls between.
        let mut news = self.tree.events().subscribe();
        let mut last = 0;
        for event in self.tree.events().since(filter) {
            last = event.seq;
            client.item(&event).await?;
        }
        if !follow {
            return Ok(());
        }
        let mut ending = self.ending.clone();
        loop {
            let event = tokio::select! {
                event = news.recv() => event,
                () = client.gone() => return Ok(()),
                _ = ending.wait_for(|e| *e) => return Ok(()),
            };
            match event {
                Ok(e) if e.seq > last && wanted(filter, &e) => client.item(&e).await?,
                Ok(_) => {}
                Err(broadcast::error::RecvError::Lagged(n)) => {
                    return Err(OpError::new(
                        ErrorKind::Internal,
                        format!("this client was too slow and lost {n} events; ask again"),
                    ));
                }
                Err(broadcast::error::RecvError::Closed) => return Ok(()),
            }
        }
    }
}
